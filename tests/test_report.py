from html.parser import HTMLParser

from vae_model.report import report, training_facts


class _Page(HTMLParser):
    """The text of a page, and whether every element that is opened is closed."""

    void = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.open, self.links = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_whole_page_that_loads_nothing_else(bundle):
    page = _Page(report(bundle))
    assert page.open == []
    assert page.links == []


def test_the_report_names_every_column_and_the_threshold(bundle):
    text = _Page(report(bundle)).text
    for name in [*bundle.schema.names, *bundle.schema.passthrough]:
        assert name in text
    assert f"{bundle.threshold.value:.4f} nats" in text


def test_levels_are_escaped(make_table, tmp_path):
    import numpy as np
    import pyarrow as pa

    from vae_model import TrainingConfig, VAEConfig, fit

    table = make_table(1200, 1)
    names = pa.array(np.where(np.arange(1200) % 2, "<script>alert(1)</script>", "b"))
    table = table.append_column("<b>", names).select(["length", "weight", "<b>"])
    small = fit(table, VAEConfig(hidden_dims=(8,), latent_dim=2), TrainingConfig(max_steps=20))
    assert "<script>" not in report(small)
    assert "&lt;script&gt;" in report(small)


def test_the_report_says_which_network_it_is_and_whose_training_is_told(bundle, mixed_table):
    from vae_model import TrainingConfig, VAEConfig, fit

    share = bundle.card["training"]["prior_share"]
    expected = f"32-32, 4 latents, prior N(0, I), in scores {share:.0%} the encodings of 400 rows"
    assert training_facts(bundle)["network"] == expected
    config = VAEConfig.of_quality("best", hidden_dims=(8,), latent_dim=2, num_components=7, num_members=2)
    best = fit(mixed_table.select(["length", "weight"]), config, TrainingConfig(max_steps=20))
    text = _Page(report(best)).text
    assert "2 members, each 8, 2 latents, prior a mixture of 7 encodings" in text
    assert text.count("of the first member") == 2
