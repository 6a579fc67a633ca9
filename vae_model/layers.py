"""The layers of the model that are not Keras's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from vae_model.losses import (
    bernoulli_nll,
    kl_to_mixture,
    kl_to_standard_normal,
    robust_gaussian_nll,
    robust_von_mises_nll,
)


@keras.saving.register_keras_serializable(package="vae_model")
class KLDivergence(keras.layers.Layer):
    """Adds beta * KL(q(z|x) || N(0, I)), averaged over the rows, to the loss; passes its inputs through.

    Args:
        beta: Weight of the term; 1.0 trains on the ELBO, any other value a beta-VAE
            (Higgins et al., 2017).

    Call arguments:
        inputs: `(z_mean, z_log_var)`, each `(batch, latent_dim)`.
    """

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # float32 stays float32 under mixed precision
        if not beta >= 0:
            raise ValueError(f"beta: expected a number >= 0, got {beta}")
        self.beta = beta

    def build(self, input_shape: Any) -> None:
        # A weight, not a float: a callback can warm it up inside the compiled graph, and a
        # checkpoint resumes it.
        self.weight = self.add_weight(
            name="beta",
            shape=(),
            dtype="float32",
            autocast=False,
            trainable=False,
            initializer=keras.initializers.Constant(self.beta),
        )

    def call(self, inputs: Any) -> Any:
        # Summed over latents, averaged over rows; float16 could not hold exp(log_var).
        mean, log_var = (ops.cast(x, "float32") for x in inputs)
        self.add_loss(self.weight * ops.mean(kl_to_standard_normal(mean, log_var)))
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "beta": self.beta}


@keras.saving.register_keras_serializable(package="vae_model")
class PseudoInputs(keras.layers.Layer):
    """Learned rows, as the encoder sees rows: their encodings are the components of a mixture prior (VampPrior).

    Args:
        num_rows: Pseudo-inputs K.

    Call arguments:
        inputs: `(batch, width)`, of which only the width matters.

    Returns:
        `(K, width)`.
    """

    def __init__(self, num_rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_rows = num_rows

    def build(self, input_shape: Any) -> None:
        shape, float32 = (self.num_rows, input_shape[-1]), {"dtype": "float32", "autocast": False}
        self.vectors = self.add_weight(name="vectors", shape=shape, initializer="zeros", **float32)

    def call(self, inputs: Any) -> Any:
        return ops.cast(self.vectors, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (self.num_rows, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_rows": self.num_rows}


@keras.saving.register_keras_serializable(package="vae_model")
class MixtureKLDivergence(KLDivergence):
    """Adds beta * E_q[log q(z|x) - log p(z)], averaged over the rows, to the loss, for a learned mixture p(z).

    Any p(z) gives an ELBO; with encodings of pseudo-inputs as components it is that of Tomczak and Welling (2018),
    here with learned weights. One draw of q estimates the expectation of log p(z).

    Args:
        beta: Weight of the term.

    Call arguments:
        inputs: `(z_mean, z_log_var, z)`, each `(batch, latent_dim)`, z a draw of q(z|x), and the components' means
            and log variances, each `(components, latent_dim)`.

    Returns:
        `(batch,)` the divergence of each row, as this draw estimates it.
    """

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        float32 = {"dtype": "float32", "autocast": False}
        self.logits = self.add_weight(name="logits", shape=input_shape[3][:1], initializer="zeros", **float32)

    def call(self, inputs: Any) -> Any:
        mean, log_var, z, means, log_vars = (ops.cast(x, "float32") for x in inputs)
        divergence = kl_to_mixture(mean, log_var, [z], (means, log_vars, self.log_weights()))
        self.add_loss(self.weight * ops.mean(divergence))
        return divergence

    def log_weights(self) -> Any:
        """`(components,)`."""
        return ops.log_softmax(self.logits)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0][:1]


@keras.saving.register_keras_serializable(package="vae_model")
class Sampling(keras.layers.Layer):
    """z = z_mean + exp(z_log_var / 2) * noise: the reparameterisation trick (Kingma and Welling, 2014).

    Noise is an input, so that a step is a function of what it is given, to be repeated and resumed; and it is
    used in evaluation too: a loss at z = z_mean is no ELBO.

    Call arguments:
        inputs: `(z_mean, z_log_var, noise)`, each `(batch, latent_dim)`; noise is standard normal.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)

    def call(self, inputs: Any) -> Any:
        mean, log_var, noise = (ops.cast(x, "float32") for x in inputs)
        return ops.cast(mean + ops.exp(0.5 * log_var) * noise, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]


@keras.saving.register_keras_serializable(package="vae_model")
def silu(x: Any) -> Any:
    """X sigmoid(x), the activation; Keras's own, whose gradient TensorFlow defines, keeps every graph for ever."""
    return x * ops.sigmoid(x)


@keras.saving.register_keras_serializable(package="vae_model")
class EncoderInputs(keras.layers.Layer):
    """All inputs of a row as one vector: numbers, circles, category embeddings, missing flags.

    Args:
        num_classes: Classes of each learned categorical feature.
        embedding_dim: Width of an embedding. Unseen and missing categories embed as zeros: a vector
            of their own would never be trained.
        nullable: Positions of the features whose missingness is learned.
        angle_features: Position of the feature of each angle.
        clip: Largest size of an encoded number that the network is shown.
    """

    def __init__(
        self,
        num_classes: Sequence[int],
        embedding_dim: int,
        nullable: Sequence[int],
        angle_features: Sequence[int],
        clip: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.embedding_dim = list(num_classes), embedding_dim
        self.nullable, self.angle_features, self.clip = list(nullable), list(angle_features), clip

    def build(self, input_shape: Any) -> None:
        if self.num_classes:
            self.offsets = np.cumsum([0, *self.num_classes[:-1]]).astype(np.int32)
            self.embeddings = self.add_weight(
                name="embeddings",
                shape=(sum(self.num_classes), self.embedding_dim),
                initializer=keras.initializers.RandomNormal(stddev=1 / math.sqrt(self.embedding_dim)),
            )

    def call(self, inputs: dict[str, Any]) -> Any:
        parts = []
        if "numbers" in inputs:
            parts.append(ops.clip(inputs["numbers"], -self.clip, self.clip))
        if "angles" in inputs:
            here = ops.take(inputs["present"], self.angle_features, axis=1)
            parts += [ops.cos(inputs["angles"]) * here, ops.sin(inputs["angles"]) * here]
        if "categories" in inputs:
            ids = inputs["categories"]
            vectors = ops.take(self.embeddings, ops.maximum(ids - 1, 0) + self.offsets, axis=0)
            vectors *= ops.cast(ids > 0, vectors.dtype)[..., None]
            parts.append(ops.reshape(vectors, (-1, len(self.num_classes) * self.embedding_dim)))
        if self.nullable:
            parts.append(1 - ops.take(inputs["present"], self.nullable, axis=1))
        return ops.concatenate([ops.cast(part, self.compute_dtype) for part in parts], axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "embedding_dim": self.embedding_dim,
            "nullable": self.nullable,
            "angle_features": self.angle_features,
            "clip": self.clip,
        }


@dataclass(frozen=True, kw_only=True)
class LikelihoodSpec:
    """What `ColumnNLL` must know of the schema; features come numeric, timestamp, categorical, fixed.

    Args:
        num_features: All features.
        num_numeric: Numeric ones.
        stddev_floors: Least standard deviation of each encoded number, view by view.
        angle_features: Position of the feature of each angle.
        max_kappas: Largest von Mises concentration of each angle.
        class_probabilities: Of each learned categorical feature.
        nullable: Positions of the features whose missingness is learned.
        num_rows: Training rows n; p(missing) stays within [1 / (n + 2), 1 - 1 / (n + 2)].
        background: Share of the background density in every likelihood.
    """

    num_features: int
    num_numeric: int
    stddev_floors: Sequence[float]
    angle_features: Sequence[int]
    max_kappas: Sequence[float]
    class_probabilities: Sequence[Sequence[float]]
    nullable: Sequence[int]
    num_rows: int
    background: float


@keras.saving.register_keras_serializable(package="vae_model")
class ColumnNLL(keras.layers.Layer):
    """-log p(x_j|z) of every feature j, from the decoder's last hidden layer.

    NLL_j = fixed_nll_j - log p(missing_j|z) - (1 - missing_j) log p(x_j|z): Gaussians of learned,
    floored standard deviation for numbers, von Mises for angles, softmaxes for categories, each
    mixed with a background that no latent moves.

    Args:
        spec: What the likelihoods need of the schema.

    Call arguments:
        hidden: `(batch, width)`.
        inputs: The row's inputs, see `EncodedTable`.

    Returns:
        `(batch, features)` float32, in nats.
    """

    def __init__(self, spec: LikelihoodSpec | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # nats in float32 under mixed precision
        self.spec = spec = LikelihoodSpec(**spec) if isinstance(spec, dict) else spec
        self.groups = _group_by_size([len(p) for p in spec.class_probabilities])
        widths = {
            "mean": len(spec.stddev_floors),
            "cosine": len(spec.angle_features),
            "sine": len(spec.angle_features),
            "logits": sum(len(members) * size for size, members in self.groups),
            "missing": len(spec.nullable),
        }
        self.heads = {name: width for name, width in widths.items() if width}

    def build(self, hidden_shape: Any, inputs_shape: Any = None) -> None:
        width = sum(self.heads.values())
        float32 = {"dtype": "float32", "autocast": False}
        kernel_shape = (hidden_shape[-1], width)
        self.kernel = self.add_weight(name="kernel", shape=kernel_shape, initializer="glorot_uniform", **float32)
        self.bias = self.add_weight(name="bias", shape=(width,), initializer="zeros", **float32)
        if self.spec.stddev_floors:
            shape = (len(self.spec.stddev_floors),)
            self.log_var = self.add_weight(name="log_var", shape=shape, initializer="zeros", **float32)
        # Classes that only fill up a group have no chance; added to the bias, that costs nothing.
        impossible = np.zeros(width, np.float32)
        if self.groups:
            end = width - len(self.spec.nullable)
            impossible[end - self.heads["logits"] : end] = np.where(self._class_shares > 0, 0, -1e9)
        self._impossible = impossible

    def decode(self, hidden: Any) -> dict[str, Any]:
        """The parameters of every likelihood, by head, float32."""
        out = ops.matmul(ops.cast(hidden, "float32"), self.kernel) + (self.bias + self._impossible)
        heads, start = {}, 0
        for name, width in self.heads.items():
            heads[name] = out[:, start : start + width]
            start += width
        return heads

    def number_log_var(self) -> Any:
        """`(views * numeric,)` log variance of each encoded number, floored smoothly."""
        if not self.spec.stddev_floors:
            return ops.zeros(0)
        floors = np.square(np.array(self.spec.stddev_floors, np.float32))
        return ops.log(floors + ops.exp(self.log_var))

    def category_logits(self, logits: Any) -> list[tuple[list[int], Any]]:
        """Logits `(batch, members, size)` of the classes of each group of columns."""
        groups, start = [], 0
        for size, members in self.groups:
            end = start + size * len(members)
            groups.append((members, ops.reshape(logits[:, start:end], (-1, len(members), size))))
            start = end
        return groups

    @property
    def _class_shares(self) -> np.ndarray:
        """Share of each class in training, group by group; 0 for those that only fill up."""
        shares = []
        for size, members in self.groups:
            for member in members:
                probabilities = self.spec.class_probabilities[member]
                shares.append(np.pad(np.array(probabilities, np.float32), (0, size - len(probabilities))))
        return np.concatenate(shares)

    def call(self, hidden: Any, inputs: dict[str, Any]) -> Any:
        spec = self.spec
        heads = self.decode(hidden)
        present = inputs["present"]
        values = []
        if "mean" in heads:
            nll = robust_gaussian_nll(inputs["numbers"], heads["mean"], self.number_log_var(), spec.background)
            views = len(spec.stddev_floors) // spec.num_numeric
            values.append(ops.sum(ops.reshape(nll, (-1, views, spec.num_numeric)), axis=1))
        if "cosine" in heads:
            max_kappas = np.array(spec.max_kappas, np.float32)
            nll = robust_von_mises_nll(inputs["angles"], heads["cosine"], heads["sine"], max_kappas, spec.background)
            of_feature = np.array(spec.angle_features) - spec.num_numeric
            values.append(ops.matmul(nll, np.eye(of_feature.max() + 1, dtype=np.float32)[of_feature]))
        if "logits" in heads:
            values.append(self._category_nll(heads["logits"], inputs["categories"]))
        width = sum(value.shape[-1] for value in values)
        if width < spec.num_features:
            values.append(ops.zeros_like(present[:, width:]))
        nll = ops.concatenate(values, axis=-1) * present + inputs["fixed_nll"]
        if "missing" in heads:
            missing = 1 - ops.take(present, spec.nullable, axis=1)
            learned = bernoulli_nll(missing, heads["missing"], math.log(spec.num_rows + 1))
            # To the nullable features' places, a column of zeros to all others.
            place = np.full(spec.num_features, len(spec.nullable))
            place[list(spec.nullable)] = np.arange(len(spec.nullable))
            nll += ops.take(ops.pad(learned, [[0, 0], [0, 1]]), place, axis=1)
        return nll

    def _category_nll(self, logits: Any, categories: Any) -> Any:
        """-log[(1 - b) softmax + b * class share] of each class; 0 for unseen ones, whose mass is fixed."""
        background = self.spec.background
        columns, order, start = [], [], 0
        for members, block in self.category_logits(logits):
            size = block.shape[-1]
            ids = ops.take(categories, members, axis=1)
            classes = ops.maximum(ids - 1, 0)
            chosen = ops.take_along_axis(block, ops.expand_dims(classes, -1), axis=-1)[..., 0]
            share = ops.take(self._class_shares, classes + (start + np.arange(len(members)) * size).astype(np.int32))
            core = (1 - background) * ops.exp(chosen - ops.logsumexp(block, axis=-1))
            columns.append(ops.where(ids > 0, -ops.log(core + background * share), 0.0))
            order += members
            start += size * len(members)
        return ops.take(ops.concatenate(columns, axis=-1), np.argsort(order), axis=1)

    def compute_output_shape(self, hidden_shape: Any, inputs_shape: Any) -> Any:
        return (hidden_shape[0], self.spec.num_features)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "spec": asdict(self.spec)}


def _group_by_size(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Positions of columns that share one padded width, a power of two: one softmax for each group."""
    groups: dict[int, list[int]] = {}
    for position, size in enumerate(sizes):
        groups.setdefault(1 << (size - 1).bit_length(), []).append(position)
    return sorted(groups.items())
