"""Training: the one caller of `fit` and of seeding."""

from __future__ import annotations

import contextlib
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
from vae_model.config import NUM_SEEDS, TrainingConfig, VAEConfig
from vae_model.losses import kl_to_standard_normal
from vae_model.model import Networks, build_vae
from vae_model.priors import AggregatePrior, MixturePrior, Posteriors
from vae_model.schema import TableSchema
from vae_model.scoring import ElboScorer, draw_noise

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
_SEED_STRIDE = 1_000_003  # between the members of one model, so that those of two seeds differ
_NUM_PRIOR_ROWS = 1000  # validation rows that an aggregate prior is fitted to
_FAR_OUT, _MAX_FAR_OUT = 3, 0.05  # interquartile ranges above the upper quartile (Tukey, 1977); share of rows
_ACTIVE_VARIANCE = 0.01  # of z_mean over rows: a unit that moves less carries nothing (Burda et al., 2016)


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class TrainedModel:
    """Trained networks and how they came about.

    Args:
        members: Each with the best weights found for it.
        scorer: Of these networks, with the noise of the score.
        history: One entry per validation of the first member: step, beta, loss, reconstruction_loss, kl_loss, val_...
        summary: Steps, the best validation loss and its parts, KL per latent, active units; of the first member.
            `val_losses` holds the best of every member.
    """

    members: list[Networks]
    scorer: ElboScorer
    history: list[dict[str, float]]
    summary: dict[str, Any]


class Trainer:
    """Trains models of one schema and configuration, any number of times: their graph is compiled once.

    Args:
        schema: Of the rows.
        config: Of the network.
        training: Of the optimisation.
    """

    def __init__(self, schema: TableSchema, config: VAEConfig, training: TrainingConfig) -> None:
        self._schema, self._config, self._training = schema, config, training
        self._strategy = _strategy(training.strategy)
        with self._strategy.scope(), _dtype_policy(training.precision):
            self._networks = build_vae(schema, config, seed=training.seed)
        self._networks.vae.num_replicas = self._strategy.num_replicas_in_sync
        self._compiled_steps = 0
        self._advance: Any = None

    def train(
        self,
        *,
        num_rows: int,
        shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
        validation: Arrays,
        on_progress: Callable[[int, int, dict[str, float]], None] | None = None,
        checkpoint: str | None = None,
        resume: bool = False,
        num_members: int | None = None,
        fit_prior: bool = True,
    ) -> TrainedModel:
        """Trains on encoded rows, keeping the weights with the least validation loss.

        Args:
            num_rows: Training rows.
            shuffled: One pass over the training rows, in blocks of shuffled rows.
            validation: Held-out rows.
            on_progress: Told the steps done, the steps at most, of all members, and the losses.
            checkpoint: File or URI that holds the state of training after each validation; those of further members
                end in their numbers.
            resume: Go on from the checkpoints, if there are any: the weights become those of a run without
                interruption.
            num_members: Networks to train, instead of the configuration's number.
            fit_prior: Fit an aggregate prior to the rows; else it stays N(0, I), as with `no_examples`.

        Raises:
            TrainingError: The loss is no longer finite.
            ValueError: A checkpoint is of another training.
        """
        config, training = self._config, self._training
        num_members = num_members or config.num_members
        members, watches = [], []
        for number in range(num_members):
            seed = (training.seed + number * _SEED_STRIDE) % NUM_SEEDS
            state = None
            if checkpoint:
                identity: dict[str, Any] = {
                    "schema": self._schema.to_json(),
                    "config": config.to_json(),
                    "training": training.to_json(),
                    "num_rows": num_rows,
                    "member": number,
                }
                state = Checkpoint(_checkpoint_of(checkpoint, number), identity)

            def report(done: int, total: int, losses: dict[str, float], number: int = number) -> None:
                if on_progress:
                    on_progress(number * total + done, num_members * total, losses)

            watch, networks = self._train_member(seed, num_rows, shuffled, validation, report, state, resume)
            if isinstance(networks.prior, AggregatePrior) and fit_prior and not training.no_examples:
                self._fit_prior(networks, networks.prior, shuffled, validation, seed)
            watches.append(watch)
            members.append(networks)
        latent_dim = members[0].encoder.outputs[0].shape[-1]
        scorer = ElboScorer(members, draw_noise(config.num_samples, latent_dim, training.seed))
        prior = members[0].prior
        summary = {
            "max_steps": watches[0].max_steps,
            "batch_size": self._batch_size(num_rows),
            "num_training_rows": num_rows,
            **watches[0].summary(),
            "val_losses": [watch.summary()["val_loss"] for watch in watches],
            **({"prior_share": prior.share} if isinstance(prior, AggregatePrior) else {}),
            **_posterior(scorer, validation),
        }
        return TrainedModel(members, scorer, watches[0].history, summary)

    def _batch_size(self, num_rows: int) -> int:
        batch_size = min(self._training.batch_size or default_batch_size(num_rows), num_rows)
        return batch_size - batch_size % self._strategy.num_replicas_in_sync

    def _train_member(
        self,
        seed: int,
        num_rows: int,
        shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
        validation: Arrays,
        on_progress: Callable[[int, int, dict[str, float]], None],
        state: Checkpoint | None,
        resume: bool,
    ) -> tuple[_Watch, Networks]:
        """How training went, and networks of their own with the best weights."""
        training, networks = self._training, self._networks
        keras.utils.set_random_seed(seed)
        # Validates where the trained ones are not plain, and scores: in float32, on one device, as any that is loaded.
        plain = build_vae(self._schema, self._config, seed=seed)
        if isinstance(plain.prior, MixturePrior):
            plain.prior.start(self._some(shuffled, seed), seed)
        networks.load_weights(plain.weights)
        batch_size = self._batch_size(num_rows)
        max_steps = training.max_steps or default_steps(num_rows, batch_size)
        # About 25 validations, each after whole executions of several steps.
        steps_per_execution = min(50, max(1, max_steps // 25))
        executions_per_validation = max(1, max_steps // 25 // steps_per_execution)
        max_steps -= max_steps % (steps_per_execution * executions_per_validation)
        self._prepare(max_steps)
        validated = networks
        if self._strategy.num_replicas_in_sync > 1 or training.precision != "float32":
            validated = plain
            plain.vae.compile(jit_compile=False)
        beta = self._config.beta
        watch = _Watch(networks, beta, int(training.kl_warmup * max_steps), training.patience, max_steps)
        if resume and state:
            watch.load(state)
        executions = iter(_executions(shuffled, num_rows, steps_per_execution, batch_size, seed, networks, watch.step))
        # The same noise every time: validations differ by their weights alone.
        noise = _noise(len(validation["present"]), networks, [seed])
        held_out = tf.data.Dataset.from_tensor_slices(validation | {"noise": noise}).batch(4096)
        while watch.goes_on:
            networks.vae.reset_metrics()
            for _ in range(executions_per_validation):
                self._advance(next(executions), watch.betas(steps_per_execution))
                losses = {name: float(value) for name, value in networks.vae.get_metrics_result().items()}
                watch.see(losses)
                on_progress(watch.step, max_steps, losses)
            if validated is plain:
                plain.load_weights(networks.weights)
            found = validated.vae.evaluate(held_out, verbose=0, return_dict=True)
            watch.validated(losses | {f"val_{name}": float(value) for name, value in found.items()})
            if state:
                state.save(*watch.state())
        watch.restore()
        plain.load_weights(networks.weights)
        return watch, plain

    def _some(self, shuffled: Callable[[np.random.Generator], Iterator[Arrays]], seed: int) -> Arrays:
        """Training rows, as many as a mixture has components; of a streamed table not from all over it."""
        block = next(shuffled(np.random.default_rng([seed, 2])))
        return {name: values[: self._config.num_components].copy() for name, values in block.items()}

    def _fit_prior(
        self,
        networks: Networks,
        prior: AggregatePrior,
        shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
        validation: Arrays,
        seed: int,
    ) -> None:
        """Fits the prior of scores to the encodings of a trained network.

        The components are validation rows, which come from all over a table, or, where these are few, training rows: a
        table with so few is usually shuffled as a whole.
        """
        order = np.random.default_rng(seed).permutation(len(validation["present"]))
        num_rows = self._config.num_components
        if len(order) >= 2 * num_rows:
            rows, order = {name: values[order[:num_rows]] for name, values in validation.items()}, order[num_rows:]
        else:
            rows = self._some(shuffled, seed)
        others = {name: values[order[:_NUM_PRIOR_ROWS]] for name, values in validation.items()}
        prior.fit(_usual_posteriors(networks, rows), _usual_posteriors(networks, others), seed)

    def _prepare(self, max_steps: int) -> None:
        """A new optimizer's state; its graph is another one where its schedule is."""
        vae = self._networks.vae
        if max_steps == self._compiled_steps:
            for variable in vae.optimizer.variables:
                variable.assign(np.zeros(variable.shape, variable.dtype))
            return
        self._compiled_steps = max_steps
        schedule = keras.optimizers.schedules.CosineDecay(self._training.learning_rate, max_steps, alpha=0.02)
        with self._strategy.scope():
            vae.compile(keras.optimizers.Adam(schedule, global_clipnorm=10.0), jit_compile=False)
            vae.optimizer.build(vae.trainable_variables)  # a compiled graph makes no variables
        if self._strategy.num_replicas_in_sync == 1:
            self._advance = _compile_steps(vae, self._networks.kl.weight)
        else:
            self._advance = _mirror_steps(vae, self._networks.kl.weight, self._strategy)


def remove_checkpoints(checkpoint: str) -> None:
    """Deletes the states of all members that are there, also of an earlier training with more of them."""
    for number in itertools.count():
        if not files.exists(file := _checkpoint_of(checkpoint, number)):
            return
        files.remove(file)


def _checkpoint_of(checkpoint: str, number: int) -> str:
    return f"{checkpoint}-{number}" if number else checkpoint


def default_batch_size(num_rows: int) -> int:
    """Rows per step: 64 under 4,096 rows, 128 under 8,192, then 256.

    Small tables learn no more from larger batches, which take up to four times as long.
    """
    return int(np.clip(2 ** (num_rows.bit_length() - 6), 64, 256))


def default_steps(num_rows: int, batch_size: int) -> int:
    """Optimizer steps by the number of rows: about 25 passes, between 2,000 and 6,000 steps."""
    return int(np.clip(25 * num_rows / batch_size, 2000, 6000))


def _compile_steps(vae: keras.Model, beta: Any) -> Any:
    """Keras's own training step, many times in one graph compiled by XLA: calls one by one take about twice as long."""
    step = tf.autograph.experimental.do_not_convert(vae.train_step)

    @tf.function(jit_compile=True)
    def advance(batches: Any, betas: Any) -> None:
        for i in tf.range(tf.shape(betas)[0]):
            beta.assign(betas[i])
            step({name: values[i] for name, values in batches.items()})

    return advance


def _mirror_steps(vae: keras.Model, beta: Any, strategy: tf.distribute.Strategy) -> Any:
    """The same on several devices: each takes the gradient of its part of a batch, and all apply their sum.

    A device's mean loss is divided by their number, so that the sum is the gradient of the batch's mean; its norm is
    clipped before. XLA cannot compile across devices.
    """
    step = tf.autograph.experimental.do_not_convert(vae.train_step)
    num_replicas = strategy.num_replicas_in_sync

    @tf.function
    def advance_all(parts: Any, betas: Any) -> None:
        for i in tf.range(tf.shape(betas)[0]):
            beta.assign(betas[i])
            strategy.run(lambda part, i: step({name: rows[i] for name, rows in part.items()}), args=(parts, i))

    def advance(batches: Any, betas: Any) -> None:
        def part(context: Any) -> Any:
            return {name: rows[:, context.replica_id_in_sync_group :: num_replicas] for name, rows in batches.items()}

        with strategy.scope():
            advance_all(strategy.experimental_distribute_values_from_function(part), betas)

    return advance


def _strategy(name: str | None) -> tf.distribute.Strategy:
    """Mirrored: on all GPUs, or, where there are none, on all logical CPUs; TensorFlow's default on one device."""
    if name is None:
        return tf.distribute.get_strategy()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        logger.warning("strategy mirrored: found one device, %s, and trains on it as without", devices[0].name)
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Keras's policy for layers that are built meanwhile."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _executions(
    shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
    num_rows: int,
    steps: int,
    batch_size: int,
    seed: int,
    networks: Networks,
    first: int,
) -> tf.data.Dataset:
    """Endless rows for `steps` batches at a time, `(steps, batch_size, width)`, from the batch `first` on.

    What a pass leaves over begins the next.
    """
    size = steps * batch_size

    def slices() -> Iterator[Arrays]:
        done, skip = divmod(first * batch_size, num_rows)
        rest: Arrays | None = None
        step = first
        for number in itertools.count(done):
            for block in shuffled(np.random.default_rng([seed, number])):  # any pass can be had without those before
                length = len(block["present"])
                block = {k: v[skip:] for k, v in block.items()}
                skip = max(0, skip - length)
                rows = block if rest is None else {k: np.concatenate([rest[k], v]) for k, v in block.items()}
                full = len(rows["present"]) // size * size
                rest = {k: v[full:] for k, v in rows.items()}
                for start in range(0, full, size):
                    batches = {k: v[start : start + size] for k, v in rows.items()}
                    batches["noise"] = _noise(size, networks, [seed, step])
                    yield {k: v.reshape(steps, batch_size, v.shape[-1]) for k, v in batches.items()}
                    step += steps

    signature = {
        tensor.name: tf.TensorSpec((steps, batch_size, tensor.shape[-1]), tensor.dtype)
        for tensor in networks.vae.inputs
    }
    return tf.data.Dataset.from_generator(slices, output_signature=signature).prefetch(2)


def _noise(num_rows: int, networks: Networks, seed: list[int]) -> np.ndarray:
    """`(num_rows, latent_dim)` standard normal draws."""
    # A stream of its own, apart from those that shuffle.
    rng = np.random.default_rng([*seed, 1, 1])
    return rng.standard_normal((num_rows, networks.encoder.outputs[0].shape[-1]), np.float32)


class _Watch:
    """Beta's warm-up, the history, early stopping, the best weights, and an end to a loss that is not finite."""

    def __init__(
        self, networks: Networks, beta: float, warmup_steps: int, patience: int | None, max_steps: int
    ) -> None:
        self._vae, self._beta_weight = networks.vae, networks.kl.weight
        self._beta, self._warmup_steps, self._patience = beta, warmup_steps, patience
        self.max_steps = max_steps
        self.step = 0
        self._best_loss, self._best_step = math.inf, 0
        self._best: list[np.ndarray] | None = None
        self._worse = 0
        self.history: list[dict[str, float]] = []

    @property
    def goes_on(self) -> bool:
        """Whether there are steps left, and patience allows them."""
        return self.step < self.max_steps and (self._patience is None or self._worse < self._patience)

    def betas(self, num_steps: int) -> np.ndarray:
        """The KL term's weight in each of the next steps."""
        steps = self.step + np.arange(num_steps)
        ramp = np.minimum(steps / self._warmup_steps, 1) if self._warmup_steps else np.ones(num_steps)
        return (self._beta * ramp).astype(np.float32)

    def see(self, losses: dict[str, float]) -> None:
        """Takes note of steps done.

        Raises:
            TrainingError: The loss is not finite.
        """
        self.step = int(self._vae.optimizer.iterations.numpy())
        self._beta_weight.assign(self.betas(1)[0])  # a validation that follows weighs the KL as the next steps do
        if not math.isfinite(losses["loss"]):
            raise TrainingError(
                f"the loss is not finite at step {self.step:,} (reconstruction {losses['reconstruction_loss']}, KL "
                f"{losses['kl_loss']} nats); lower learning_rate, or look for columns with extreme values"
            )

    def validated(self, losses: dict[str, float]) -> None:
        """Takes note of a validation.

        Raises:
            TrainingError: Its loss is not finite.
        """
        self.history.append({"step": self.step, "beta": float(np.asarray(self._beta_weight)), **losses})
        if not math.isfinite(losses["val_loss"]):
            raise TrainingError(f"the validation loss is not finite at step {self.step:,}: {losses}")
        # Under a smaller beta the loss is another one: nothing counts before the warm-up is over.
        if self.step >= self._warmup_steps:
            self._compare(losses["val_loss"])

    def _compare(self, loss: float) -> None:
        if loss < self._best_loss:
            self._best_loss, self._best_step, self._worse = loss, self.step, 0
            self._best = [np.asarray(weight) for weight in self._vae.weights]
        else:
            self._worse += 1

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
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
        return [*self._vae.weights, *self._vae.optimizer.variables]

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
            "stopped_early": self.step < self.max_steps,
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


def _usual_posteriors(networks: Networks, rows: Arrays) -> Posteriors:
    """`z_mean` and `z_log_var` of rows, but for the few whose score, at z = z_mean under N(0, I), is far out.

    Encodings of anomalies would vouch for others like them.
    """
    inputs = {name: tf.convert_to_tensor(values) for name, values in rows.items()}
    z_mean, z_log_var = networks.encoder(inputs, training=False)
    column_nll = networks.likelihood(networks.decoder(z_mean, training=False), inputs)
    score = np.asarray(tf.reduce_sum(column_nll, axis=1) + kl_to_standard_normal(z_mean, z_log_var))
    low, high, few = np.quantile(score, [0.25, 0.75, 1 - _MAX_FAR_OUT])
    usual = score <= max(high + _FAR_OUT * (high - low), few)
    return z_mean.numpy()[usual], z_log_var.numpy()[usual]


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
