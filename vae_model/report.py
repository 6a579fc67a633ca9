"""A bundle as one page of HTML that opens anywhere: no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from vae_model.cli import source_text

if TYPE_CHECKING:
    from vae_model.bundle import Bundle

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
svg { width: 100%; height: auto } .dim { color: #777 }
text { font: 11px system-ui, sans-serif; fill: #555 }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 220, 60, 30


def report(bundle: Bundle) -> str:
    """The page: what was learned from, how training went, what scores mean, what each column is."""
    card = bundle.card
    training, data = card["training"], card["data"]
    facts = {
        "version": bundle.model_version,
        "written": card["created"],
        "data": f"{data['num_rows']:,} rows, {data['num_columns']} columns of {source_text(data['source'])}",
        **training_facts(bundle),
        "active latents": f"{training['active_units']} of {len(training['kl_per_latent'])}",
        "threshold": f"{bundle.threshold.value:.4f} nats, by {bundle.threshold.rule.replace('_', ' ')}",
        "calibration": f"{bundle.calibration.num_rows:,} rows ({bundle.calibration.method})",
    }
    columns = [
        (f.name, f.kind, f"{f.num_missing / max(f.num_rows, 1):.2%}", f.description) for f in bundle.schema.features
    ]
    columns += [(name, "carried", "", reason) for name, reason in bundle.schema.passthrough.items()]
    latents = sorted(training["kl_per_latent"], reverse=True)
    medians = bundle.calibration.column_medians
    loudest = np.argsort(-(bundle.calibration.column_nll[0] - medians))
    nll = [(bundle.schema.names[j], f"{medians[j]:.2f}", f"{bundle.calibration.column_nll[0][j]:.2f}") for j in loudest]
    sections = [
        f"<h1>{escape(str(bundle.model_version))}</h1>",
        _table(("", ""), facts.items()),
        "<h2>Loss by optimizer step, nats</h2>",
        _curves(bundle.history),
        "<h2>Scores of calibration rows, nats</h2>",
        _histogram(bundle.calibration.scores, bundle.threshold.value),
        "<h2>KL of each latent to N(0, 1), nats</h2>",
        _table(("latent", "KL"), ((str(i + 1), f"{value:.3f}") for i, value in enumerate(latents))),
        "<h2>Columns</h2>",
        _table(("name", "kind", "missing", "what is known"), columns),
        "<h2>NLL of each column in calibration, nats</h2>",
        _table(("column", "median", "largest"), nll),
    ]
    body = "\n".join(sections)
    title = f"beam-vae {escape(str(bundle.model_version))}"
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>{body}\n'


def training_facts(bundle: Bundle) -> dict[str, str]:
    """What was trained, and how that went, by heading."""
    config, training = bundle.config, bundle.card["training"]
    share = training.get("prior_share", 0.0)
    mixed_with = f", in scores {share:.0%} the encodings of {config.num_components:,} rows" if share else ""
    prior = {
        "normal": "N(0, I)",
        "aggregate": f"N(0, I){mixed_with}",
        "mixture": f"a mixture of {config.num_components:,} encodings",
    }[config.prior]
    network = f"{'-'.join(map(str, config.hidden_dims))}, {bundle.noise.shape[1]} latents, prior {prior}"
    first = ""
    if config.num_members > 1:
        network, first = f"{config.num_members} members, each {network}", "; of the first member"
    early = ", stopped early" if training["stopped_early"] else ""
    steps = f"{training['steps']:,} steps of {training['batch_size']} rows, best at {training['best_step']:,}{early}"
    if num_suspects := training.get("num_suspects"):
        steps += f"; {num_suspects:,} suspects left out"
    parts = f"reconstruction {training['val_reconstruction_loss']:.3f} + KL {training['val_kl_loss']:.3f}"
    return {
        "network": network,
        "training": steps + first,
        "held-out loss": f"{training['val_loss']:.3f} nats = {parts}{first}",
    }


def _table(headings: Sequence[str], rows: object) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings) if any(headings) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)  # type: ignore[attr-defined]
    return f"<table><tr>{head}</tr>{body}</table>"


def _axes(x: tuple[float, float], y: tuple[float, float], inner: str) -> str:
    """A frame with the ends of both axes."""
    bottom = _HEIGHT - _BOTTOM
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f'<path d="M{_LEFT} 5V{bottom}H{_WIDTH - 5}" fill="none" stroke="#999"/>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 10}">{x[0]:,.4g}</text>'
        f'<text x="{_WIDTH - 5}" y="{_HEIGHT - 10}" text-anchor="end">{x[1]:,.4g}</text>'
        f'<text x="{_LEFT - 5}" y="15" text-anchor="end">{y[1]:,.4g}</text>'
        f'<text x="{_LEFT - 5}" y="{bottom}" text-anchor="end">{y[0]:,.4g}</text>{inner}</svg>'
    )


def _place(values: np.ndarray, low: float, high: float, start: float, end: float) -> np.ndarray:
    """Values as positions on an axis."""
    return start + (np.clip(values, low, high) - low) / max(high - low, 1e-12) * (end - start)


def _curves(history: Sequence[dict[str, float]]) -> str:
    lines = {"loss": "#bbb", "val_loss": "#06c"}
    steps = np.array([entry["step"] for entry in history])
    losses = np.array([[entry[name] for name in lines] for entry in history])
    # The first losses of a fresh network would flatten all that follows.
    low, high = float(losses.min()), float(np.quantile(losses, 0.9))
    x = _place(steps, steps[0], steps[-1], _LEFT, _WIDTH - 5)
    drawn = ""
    for i, (name, colour) in enumerate(lines.items()):
        y = _place(losses[:, i], low, high, _HEIGHT - _BOTTOM, 5)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        drawn += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        label = "training" if name == "loss" else "held out"
        drawn += f'<text x="{_WIDTH - 60}" y="{20 + 15 * i}" style="fill:{colour}">{label}</text>'
    return _axes((steps[0], steps[-1]), (low, high), drawn)


def _histogram(scores: np.ndarray, threshold: float) -> str:
    low, high = float(scores[0]), max(float(np.quantile(scores, 0.999)), threshold)
    counts, edges = np.histogram(scores, bins=60, range=(low, max(high, low + 1e-6)))
    x = _place(edges, low, edges[-1], _LEFT, _WIDTH - 5)
    y = _place(counts, 0, counts.max(), _HEIGHT - _BOTTOM, 5)
    bars = "".join(
        f'<rect x="{a:.1f}" y="{t:.1f}" width="{b - a:.1f}" height="{_HEIGHT - _BOTTOM - t:.1f}" fill="#8bd"/>'
        for a, b, t in zip(x[:-1], x[1:], y, strict=True)
    )
    at = float(_place(np.array(threshold), low, edges[-1], _LEFT, _WIDTH - 5))
    line = f'<path d="M{at:.1f} 5V{_HEIGHT - _BOTTOM}" stroke="#c00"/>'
    label = f'<text x="{at - 4:.1f}" y="15" text-anchor="end" style="fill:#c00">threshold</text>'
    return _axes((low, edges[-1]), (0, counts.max()), bars + line + label)
