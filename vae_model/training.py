"""Training: the one caller of `fit` and of seeding."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vae_model import files
from vae_model.config import TrainingConfig, VAEConfig
from vae_model.model import Networks, build_vae
from vae_model.schema import TableSchema
from vae_model.scoring import ElboScorer, draw_noise

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
_ACTIVE_VARIANCE = 0.01  # of z_mean over rows: a unit that moves less carries nothing (Burda et al., 2016)


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class TrainedModel:
    """Trained networks and how they came about.

    Args:
        networks: With the best weights found.
        scorer: Of these networks, with the noise of the score.
        history: One entry per validation: step, beta, loss, reconstruction_loss, kl_loss, val_...
        summary: Steps, the best validation loss and its parts, KL per latent, active units.
    """

    networks: Networks
    scorer: ElboScorer
    history: list[dict[str, float]]
    summary: dict[str, Any]


def train(
    schema: TableSchema,
    config: VAEConfig,
    training: TrainingConfig,
    *,
    num_rows: int,
    shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
    validation: Arrays,
    on_progress: Callable[[int, int, dict[str, float]], None] | None = None,
    checkpoint: str | None = None,
    resume: bool = False,
) -> TrainedModel:
    """Trains a VAE on encoded rows, keeping the weights with the least validation loss.

    Args:
        schema: Of the rows.
        config: Of the network.
        training: Of the optimisation.
        num_rows: Training rows.
        shuffled: One pass over the training rows, in blocks of shuffled rows.
        validation: Held-out rows.
        on_progress: Told the steps done, the steps at most, and the losses.
        checkpoint: File or URI that holds the state of training after each validation.
        resume: Go on from the checkpoint, if there is one: the weights become those of a run without
            interruption.

    Raises:
        TrainingError: The loss is no longer finite.
        ValueError: The checkpoint is of another training.
    """
    keras.utils.set_random_seed(training.seed)
    networks = build_vae(schema, config, seed=training.seed)
    max_steps = training.max_steps or default_steps(num_rows, training.batch_size)
    batch_size = min(training.batch_size, num_rows)
    # About 25 validations; Keras runs whole executions of several steps, and so would run over.
    steps_per_execution = min(10, max(1, max_steps // 25))
    steps_per_validation = max_steps // 25 // steps_per_execution * steps_per_execution or 1
    num_validations = max_steps // steps_per_validation
    max_steps = num_validations * steps_per_validation
    schedule = keras.optimizers.schedules.CosineDecay(training.learning_rate, max_steps, alpha=0.02)
    networks.vae.compile(
        optimizer=keras.optimizers.Adam(schedule, global_clipnorm=10.0),
        steps_per_execution=steps_per_execution,
        jit_compile=False,
    )
    warmup_steps = int(training.kl_warmup * max_steps)
    watch = _Watch(networks, config.beta, warmup_steps, training.patience, max_steps, on_progress)
    identity = {"schema": schema.to_json(), "config": config.to_json(), "training": training.to_json()}
    watch.checkpoint = Checkpoint(checkpoint, identity | {"num_rows": num_rows}) if checkpoint else None
    if resume and watch.checkpoint:
        watch.load(watch.checkpoint)
    batches = _batches(shuffled, num_rows, batch_size, training.seed, networks, first=watch.step)
    held_out = tf.data.Dataset.from_tensor_slices(validation).batch(4096)
    networks.vae.fit(
        batches,
        epochs=num_validations if watch.goes_on else 0,
        initial_epoch=len(watch.history),
        steps_per_epoch=steps_per_validation,
        validation_data=held_out,
        callbacks=[watch],
        shuffle=False,  # the batches are shuffled already
        verbose=0,
    )
    watch.restore()
    latent_dim = networks.encoder.outputs[0].shape[-1]
    scorer = ElboScorer(networks, draw_noise(config.num_samples, latent_dim, training.seed))
    summary = {"max_steps": max_steps, "batch_size": batch_size, "num_training_rows": num_rows, **watch.summary()}
    summary |= _posterior(scorer, validation)
    return TrainedModel(networks, scorer, watch.history, summary)


def default_steps(num_rows: int, batch_size: int) -> int:
    """Optimizer steps by the number of rows: about 25 passes, between 2,000 and 6,000 steps."""
    return int(np.clip(25 * num_rows / batch_size, 2000, 6000))


def _batches(
    shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
    num_rows: int,
    batch_size: int,
    seed: int,
    networks: Networks,
    first: int,
) -> tf.data.Dataset:
    """Endless batches of exactly `batch_size` rows, from the `first` on; what a pass leaves over begins the next."""

    def blocks() -> Iterator[Arrays]:
        done, skip = divmod(first * batch_size, num_rows)
        rest: Arrays | None = None
        for number in itertools.count(done):
            for block in shuffled(np.random.default_rng([seed, number])):  # any pass can be had without those before
                size = len(block["present"])
                block = {k: v[skip:] for k, v in block.items()}
                skip = max(0, skip - size)
                rows = block if rest is None else {k: np.concatenate([rest[k], v]) for k, v in block.items()}
                full = len(rows["present"]) // batch_size
                rest = {k: v[full * batch_size :] for k, v in rows.items()}
                if full:
                    yield {k: v[: full * batch_size].reshape(full, batch_size, v.shape[-1]) for k, v in rows.items()}

    signature = {
        tensor.name: tf.TensorSpec((None, batch_size, tensor.shape[-1]), tensor.dtype)
        for tensor in networks.encoder.inputs
    }
    # A block at a time through Python, its batches sliced in the graph.
    return tf.data.Dataset.from_generator(blocks, output_signature=signature).unbatch().prefetch(16)


class _Watch(keras.callbacks.Callback):
    """Beta's warm-up, the history, early stopping, the best weights, and an end to a loss that is not finite."""

    def __init__(
        self,
        networks: Networks,
        beta: float,
        warmup_steps: int,
        patience: int | None,
        max_steps: int,
        on_progress: Callable[[int, int, dict[str, float]], None] | None,
    ) -> None:
        super().__init__()
        self._beta_weight, self._vae = networks.vae.get_layer("kl").weight, networks.vae
        self._beta, self._warmup_steps, self._patience = beta, warmup_steps, patience
        self._max_steps, self._on_progress = max_steps, on_progress
        self.step = 0
        self.checkpoint: Checkpoint | None = None
        self._best_loss, self._best_step = math.inf, 0
        self._best: list[np.ndarray] | None = None
        self._worse = 0
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._warm_up()

    def _warm_up(self) -> None:
        ramp = min(1.0, self.step / self._warmup_steps) if self._warmup_steps else 1.0
        self._beta_weight.assign(self._beta * ramp)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # `batch` counts within the epoch and jumps by the steps of one execution.
        self.step = int(self._vae.optimizer.iterations.numpy())
        self._warm_up()  # here, so that a validation that follows weighs the KL as the next steps do
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingError(
                f"the loss is not finite at step {self.step:,} (reconstruction {logs.get('reconstruction_loss')}, KL "
                f"{logs.get('kl_loss')} nats); lower learning_rate, or look for columns with extreme values"
            )
        if self._on_progress:
            self._on_progress(self.step, self._max_steps, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = {key: float(value) for key, value in (logs or {}).items()}
        self.history.append({"step": self.step, "beta": float(self._beta_weight), **logs})
        if not math.isfinite(logs["val_loss"]):
            raise TrainingError(f"the validation loss is not finite at step {self.step:,}: {logs}")
        # Under a smaller beta the loss is another one: nothing counts before the warm-up is over.
        if self.step >= self._warmup_steps:
            self._compare(logs["val_loss"])
        if self.checkpoint:
            self.checkpoint.save(*self._state())

    def _compare(self, loss: float) -> None:
        if loss < self._best_loss:
            self._best_loss, self._best_step, self._worse = loss, self.step, 0
            self._best = [np.asarray(weight) for weight in self._vae.weights]
        else:
            self._worse += 1
            self._vae.stop_training = not self.goes_on

    @property
    def goes_on(self) -> bool:
        """Whether patience allows another step."""
        return self._patience is None or self._worse < self._patience

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that training depends on: arrays by name, and scalars."""
        arrays = {f"model/{i}": weight for i, weight in enumerate(self._variables())}
        arrays |= {f"best/{i}": weight for i, weight in enumerate(self._best or [])}
        scalars = {
            "step": self.step,
            "best_loss": self._best_loss,
            "best_step": self._best_step,
            "worse": self._worse,
            "history": self.history,
        }
        return arrays, scalars

    def _variables(self) -> list[Any]:
        optimizer = self._vae.optimizer
        if not optimizer.built:
            optimizer.build(self._vae.trainable_variables)
        return [*self._vae.weights, *optimizer.variables, self._vae.get_layer("sampling").seed_generator.state]

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes up the state that a checkpoint holds, if there is one."""
        if (found := checkpoint.load()) is None:
            return
        arrays, scalars = found
        for i, variable in enumerate(self._variables()):
            variable.assign(arrays[f"model/{i}"])
        self._best = [arrays[f"best/{i}"] for i in range(len(self._vae.weights))] if "best/0" in arrays else None
        self.step, self.history, self._worse = scalars["step"], scalars["history"], scalars["worse"]
        self._best_loss, self._best_step = scalars["best_loss"], scalars["best_step"]

    def restore(self) -> None:
        """Puts the best weights back."""
        if self._best is not None:
            for weight, value in zip(self._vae.weights, self._best, strict=True):
                weight.assign(value)

    def summary(self) -> dict[str, Any]:
        best = next((entry for entry in self.history if entry["step"] == self._best_step), self.history[-1])
        keys = ("val_loss", "val_reconstruction_loss", "val_kl_loss")
        return {
            "steps": self.step,
            "best_step": int(best["step"]),
            "stopped_early": self.step < self._max_steps,
            **{key: best[key] for key in keys},
        }


class Checkpoint:
    """The state of one training in one file, replaced whole.

    Args:
        uri: Of the file.
        identity: What makes the training the one it is; a checkpoint of another is refused.
    """

    def __init__(self, uri: str, identity: dict[str, Any]) -> None:
        self._uri, self._identity = uri, json.loads(json.dumps(identity))

    def save(self, arrays: dict[str, Any], scalars: dict[str, Any]) -> None:
        stream = io.BytesIO()
        text = json.dumps({"identity": self._identity, **scalars})
        np.savez(stream, allow_pickle=False, scalars=np.array(text), **{k: np.asarray(v) for k, v in arrays.items()})
        with files.new_file(self._uri) as file:
            file.write(stream.getvalue())

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and scalars last saved; None if nothing was.

        Raises:
            ValueError: The checkpoint is of another training; names what differs.
        """
        if not files.exists(self._uri):
            return None
        with np.load(io.BytesIO(files.read_file(self._uri)), allow_pickle=False) as arrays:
            found = dict(arrays)
        scalars = json.loads(str(found.pop("scalars")))
        if differing := _differences(scalars.pop("identity"), self._identity):
            raise ValueError(
                f"{self._uri}: is of another training: {'; '.join(differing[:5])}; delete it to begin anew"
            )
        return found, scalars


def _differences(then: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, by its path."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [
            text for key in keys for text in _differences(then.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    if then == now:
        return []
    short = len(str(then)) + len(str(now)) < 100
    return [f"{where}: was {then}, is {now}" if short else f"{where} differs"]


def _posterior(scorer: ElboScorer, validation: Arrays) -> dict[str, Any]:
    """How much each latent is used; warns when none is."""
    z_mean, z_log_var = scorer.latents(validation)
    kl_per_latent = (0.5 * (z_mean**2 + np.expm1(z_log_var) - z_log_var)).mean(axis=0)
    active = int((z_mean.var(axis=0) > _ACTIVE_VARIANCE).sum())
    if active == 0:
        logger.warning(
            "the posterior collapsed: no latent varies with the row, so columns are scored one by one and broken "
            "combinations go unseen; try more steps, kl_warmup, or a smaller beta"
        )
    return {"kl_per_latent": kl_per_latent.round(4).tolist(), "active_units": active}
