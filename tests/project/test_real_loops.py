"""Training loops in the shape of public codes: Optax's line replaced by ours.

Each loop is a small one written here, in the shape of the code that it is named after.
It takes the module whose clipping it uses and returns its losses, which have to be the
same for both modules. A loop reads each loss before the next step: several steps under
way on devices that one CPU simulates wait for each other for a long time.
"""

import contextlib
import functools
import types
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, struct
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

OURS = types.SimpleNamespace(
    adaptive_grad_clip=clipx.adaptive_grad_clip,
    apply_if_finite=lambda inner, _: clipx.skip_spikes(inner, threshold=jnp.inf),
    clip=clipx.clip,
    clip_by_block_rms=clipx.clip_by_block_rms,
    clip_by_global_norm=clipx.clip_by_global_norm,
    per_example_global_norm_clip=clipx.per_example_global_norm_clip,
)
NONE = types.SimpleNamespace(  # no clipping, which has to show in the losses
    adaptive_grad_clip=lambda max_norm: optax.identity(),
    apply_if_finite=lambda inner, _: inner,
    clip=lambda max_norm: optax.identity(),
    clip_by_block_rms=lambda max_norm: optax.identity(),
    clip_by_global_norm=lambda max_norm: optax.identity(),
    per_example_global_norm_clip=lambda grads, _: (
        [jnp.sum(g, axis=0) for g in grads],
        0,
    ),
)
# Else Adam divides the length of its gradients out, and clipping changes little.
adam = functools.partial(optax.adam, eps=0.1)
LOOPS = {}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype(np.float32)
Y = (X @ RNG.normal(size=(4, 1)) * 5).astype(np.float32)


def loop(fun):
    LOOPS[fun.__name__] = fun
    return fun


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """JAX's usual promotion, which these codes rely on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def replicated_blind_axes():
    """The switch for a program whose gradients are the same on every device."""
    before = clipx.config.blind_axes
    clipx.config.update("blind_axes", "replicated")
    try:
        yield
    finally:
        clipx.config.update("blind_axes", before)


def auto_mesh(name):
    """Two devices, where XLA finds out how each value lies."""
    return jax.make_mesh((2,), (name,), axis_types=(AxisType.Auto,))


def mlp(params, x):
    return (
        jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        @ (params["out"]["kernel"])
    )


def new_params(seed=0, width=8):
    rng = np.random.default_rng(seed)
    return {
        "hidden": {
            "kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32),
            "bias": jnp.zeros(width),
        },
        "out": {"kernel": jnp.asarray(rng.normal(size=(width, 1)), jnp.float32)},
    }


def squared_error(params, x, y):
    return jnp.mean((mlp(params, x) - y) ** 2)


@loop
def purejaxrl(lib):
    """PPO as one program: rollouts, epochs, minibatches in scans; vmap over seeds."""

    class ActorCritic(linen.Module):
        @linen.compact
        def __call__(self, x):
            mean = linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))[..., 0]
            value = linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))[..., 0]
            return mean, self.param("log_std", linen.initializers.zeros, ()), value

    def log_prob(mean, log_std, action):
        return -0.5 * ((action - mean) / jnp.exp(log_std)) ** 2 - log_std

    net = ActorCritic()
    updates, steps, envs, epochs, minibatches = 4, 8, 4, 2, 2

    def rate(count):
        return 3e-3 * (1.0 - count // (epochs * minibatches) / updates)

    def train(rng):
        rng, key = jax.random.split(rng)
        state = TrainState.create(
            apply_fn=net.apply,
            params=net.init(key, jnp.zeros(2)),
            tx=optax.chain(lib.clip_by_global_norm(0.5), adam(rate)),
        )

        def env_step(carry, _):
            state, obs, rng = carry
            rng, key = jax.random.split(rng)
            mean, log_std, value = net.apply(state.params, obs)
            action = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
            speed = obs[:, 1] + 0.1 * jnp.tanh(action)
            after = jnp.stack([obs[:, 0] + 0.1 * speed, speed], axis=1)
            seen = (obs, action, value, -10 * after[:, 0] ** 2)
            return (state, after, rng), (*seen, log_prob(mean, log_std, action))

        def loss_fn(params, batch):
            obs, action, value, logp, advantage, target = batch
            mean, log_std, new_value = net.apply(params, obs)
            ratio = jnp.exp(log_prob(mean, log_std, action) - logp)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            actor = -jnp.minimum(
                ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage
            ).mean()
            near = value + jnp.clip(new_value - value, -0.2, 0.2)
            errors = jnp.maximum((new_value - target) ** 2, (near - target) ** 2)
            return actor + 0.25 * errors.mean()

        def epoch(carry, _):
            state, batch, rng = carry
            rng, key = jax.random.split(rng)
            start = jax.random.randint(key, (), 0, steps * envs)
            order = (start + 5 * jnp.arange(steps * envs)) % (steps * envs)
            shuffled = jax.tree.map(
                lambda x: x[order].reshape(minibatches, -1, *x.shape[1:]), batch
            )

            def minibatch(state, part):
                loss, grads = jax.value_and_grad(loss_fn)(state.params, part)
                return state.apply_gradients(grads=grads), loss

            state, losses = jax.lax.scan(minibatch, state, shuffled)
            return (state, batch, rng), losses

        def update(carry, _):
            state, obs, rng = carry
            (state, obs, rng), (seen, action, value, reward, logp) = jax.lax.scan(
                env_step, (state, obs, rng), None, steps
            )
            last = net.apply(state.params, obs)[2]

            def advantage(carry, now):
                later, next_value = carry
                value, reward = now
                later = reward + 0.99 * next_value - value + 0.94 * later
                return (later, value), later

            _, advantages = jax.lax.scan(
                advantage, (jnp.zeros(envs), last), (value, reward), reverse=True
            )
            batch = (seen, action, value, logp, advantages, advantages + value)
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
            carry, losses = jax.lax.scan(epoch, (state, batch, rng), None, epochs)
            return (carry[0], obs, carry[2]), losses

        rng, key = jax.random.split(rng)
        obs = jax.random.normal(key, (envs, 2))
        return jax.lax.scan(update, (state, obs, rng), None, updates)[1]

    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)  # soonest compiled
    return jax.jit(jax.vmap(train))(keys)


@struct.dataclass
class BraxState:
    params: Any
    optimizer_state: Any


def brax(lib, devices=2):
    """A pmap of a scan; gradients are averaged by pmean; update gets no params."""
    tx = optax.chain(lib.clip_by_global_norm(0.5), adam(1e-2))

    def sgd_step(state, batch):
        loss, grads = jax.value_and_grad(squared_error)(state.params, *batch)
        loss, grads = jax.lax.pmean((loss, grads), axis_name="i")
        updates, optimizer_state = tx.update(grads, state.optimizer_state)
        params = optax.apply_updates(state.params, updates)
        return BraxState(params, optimizer_state), loss

    @functools.partial(jax.pmap, axis_name="i")
    def epoch(state, batches):
        return jax.lax.scan(sgd_step, state, batches)

    params = new_params()
    state = jax.tree.map(
        lambda x: jnp.stack([x] * devices), BraxState(params, tx.init(params))
    )
    batches = [x.reshape(devices, 4, 32 // devices // 4, -1) for x in (X, Y)]
    losses = []
    for _ in range(3):
        state, found = epoch(state, batches)
        losses += [*found[0]]
    return losses


@loop
def brax_on_one_device(lib):
    return brax(lib, devices=1)


@loop
def brax_on_two_devices(lib):
    with replicated_blind_axes():
        return brax(lib, devices=2)


@loop
def nanodo(lib):
    """A language model in Linen on a mesh, with accumulation outermost."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(11, 8, name="embed")(tokens)
            x = x + linen.Dense(8)(jax.nn.gelu(linen.Dense(16)(linen.LayerNorm()(x))))
            return linen.Dense(11, name="output")(x)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "bias" not in jax.tree_util.keystr(path), params
        )

    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
    optimizer = optax.adamw(rate, b2=0.98, eps=1e-9, weight_decay=0.1, mask=decayed)
    optimizer = optax.chain(lib.clip_by_global_norm(0.05), optimizer)
    tx = optax.MultiSteps(optimizer, 2)
    model = Model()
    mesh = auto_mesh("data")
    tokens = jnp.asarray(RNG_TOKENS)
    replicated = NamedSharding(mesh, P())

    @functools.partial(jax.jit, out_shardings=replicated)
    def init():
        params = model.init(jax.random.key(0), tokens[0])["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = init()

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        ).mean()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(replicated, None))
    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for i in range(8):
        batch = jax.device_put(tokens[i % 4], NamedSharding(mesh, P("data")))
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses


RNG_TOKENS = RNG.integers(0, 11, (4, 8, 9))


@loop
def tunix(lib):
    """NNX: the optimizer holds its state, and accumulates."""
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    )
    tx = optax.chain(lib.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=0.1))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(tx, 3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    return [step(model, optimizer, X, Y) for _ in range(12)]


def big_vision_optimizer(clipper, freeze=True):
    """Masks around each part: what is frozen is neither measured nor moved."""
    frozen = {"hidden": {"kernel": False, "bias": freeze}, "out": {"kernel": False}}
    trained = jax.tree.map(lambda x: not x, frozen)
    kernels = {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}}
    return optax.chain(
        optax.masked(clipper, trained),
        optax.masked(optax.scale_by_adam(eps=0.1), trained),
        optax.scale(0.05),
        optax.add_decayed_weights(1e-3, kernels),
        optax.masked(optax.scale_by_schedule(lambda i: 1 / (i + 1.0)), trained),
        optax.masked(optax.set_to_zero(), frozen),
        optax.scale(-1.0),
    )


@loop
def big_vision(lib):
    return run(big_vision_optimizer(lib.clip_by_global_norm(0.5)), new_params())


@loop
def big_vision_per_example(lib):
    """Gradients with a batch axis, clipped and averaged by the first transformation."""

    def update(updates, state, params=None):
        flat, tree = jax.tree.flatten(updates)
        clipped, _ = lib.per_example_global_norm_clip(flat, 0.5)
        mean = [x / flat[0].shape[0] for x in clipped]
        return jax.tree.unflatten(tree, mean), state

    clipper = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    tx = big_vision_optimizer(clipper, freeze=False)
    grad_fn = jax.vmap(jax.value_and_grad(squared_error), (None, 0, 0))
    return run(tx, new_params(), grad_fn=grad_fn)


def run(tx, params, steps=10, grad_fn=None, batches=None):
    """The usual loop: value_and_grad, update with params, apply_updates, in jit."""
    grad_fn = jax.value_and_grad(squared_error) if grad_fn is None else grad_fn

    @jax.jit
    def step(params, state, x, y):
        loss, grads = grad_fn(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jnp.mean(loss)

    state = jax.jit(tx.init)(params)
    losses = []
    for i in range(steps):
        x, y = batches[i] if batches else (X, Y)
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    return losses


@loop
def haiku(lib):
    """A transformed module, with the adaptive clipping of normalizer-free nets."""
    net = hk.transform(lambda x: hk.nets.MLP([8, 8, 1])(x))
    params = jax.jit(net.init)(jax.random.key(0), X)

    def loss_fn(params, x, y):
        return jnp.mean((net.apply(params, None, x) - y) ** 2)

    tx = optax.chain(lib.adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9))
    return run(tx, params, grad_fn=jax.value_and_grad(loss_fn))


@loop
def brax_analytic_gradients(lib):
    """Entries clipped, then the whole."""
    tx = optax.chain(lib.clip(0.1), lib.clip_by_block_rms(0.05), adam(1e-2))
    return run(tx, new_params())


@loop
def apply_if_finite(lib):
    """Two batches of NaN: those steps are skipped, moments and all."""
    broken = np.full_like(X, np.nan)
    batches = [(broken if i in (2, 5) else X, Y) for i in range(10)]
    tx = optax.chain(lib.clip_by_global_norm(0.5), adam(1e-2))
    return run(lib.apply_if_finite(tx, 5), new_params(), batches=batches)


@loop
def numpyro(lib):
    """Stochastic variational inference: (count, (params, state)) through a scan.

    A step whose loss or state is not finite is undone by a conditional.
    """
    tx = optax.chain(lib.clip_by_global_norm(0.5), adam(0.05))

    def init(params):
        return jnp.array(0), (params, tx.init(params))

    def stable_update(loss_fn, state):
        count, (params, inner) = state
        loss, grads = jax.value_and_grad(loss_fn)(params)
        flat, _ = jax.flatten_util.ravel_pytree(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(flat).all()

        def moved(_):
            updates, after = tx.update(grads, inner, params)
            return count + 1, (optax.apply_updates(params, updates), after)

        return loss, jax.lax.cond(finite, moved, lambda _: state, None)

    def body(carry, i):
        state, rng = carry
        rng, key = jax.random.split(rng)

        def minus_elbo(params):
            z = params["loc"] + jnp.exp(params["log_scale"]) * jax.random.normal(key)
            fit = jnp.sum((X[:, 0] - z) ** 2) + 0.5 * z**2 - params["log_scale"]
            return jnp.where(i == 3, jnp.nan, fit)

        loss, state = stable_update(minus_elbo, state)
        return (state, rng), loss

    start = init({"loc": jnp.array(3.0), "log_scale": jnp.array(0.0)})
    carry = (start, jax.random.key(0))
    return jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(20))[1])(carry)


@loop
def equinox(lib):
    """filter_jit, a module that carries functions, and an update by keyword."""
    model = eqx.nn.MLP(4, 1, 8, 1, jnp.tanh, key=jax.random.key(0))
    tx = optax.chain(lib.clip_by_global_norm(0.5), adam(1e-2))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = jax.jit(tx.init)(params)

    @eqx.filter_jit
    def step(params, static, x, y, state):
        def loss_fn(params):
            model = eqx.combine(params, static)
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params=params)
        return eqx.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(10):
        params, state, loss = step(params, static, X, Y, state)
        losses.append(float(loss))
    return losses


class OptParam:
    """A parameter that is neither an array nor a pytree."""

    def __init__(self, value, weight_decay_scale=1.0):
        self.value = value
        self.weight_decay_scale = weight_decay_scale

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)


class Partitioned(NamedTuple):
    """An optimizer that also says how its state lies on the mesh."""

    init: Any
    update: Any
    partition: Any


@loop
def axlearn(lib):
    """OptParam for each parameter in init and update, and a sharded state."""
    mesh = auto_mesh("model")
    specs = {"hidden": {"kernel": P(None, "model"), "bias": P("model")}}
    specs["out"] = {"kernel": P("model", None)}

    def values(params):
        return jax.tree.map(lambda p: p.value, params)

    def with_partition_fn(base, partition):
        return Partitioned(
            lambda params: base.init(values(params)),
            lambda updates, state, params: base.update(updates, state, values(params)),
            partition,
        )

    def of_the_same_shape(base, specs):
        """Moments lie as their parameters do, and all else is on every device."""
        shapes = jax.eval_shape(base.init, new_params())
        return optax.tree.map_params(
            base,
            lambda _, spec: spec,
            shapes,
            specs,
            transform_non_params=lambda _: P(),
        )

    clipper = lib.clip_by_global_norm(0.5)
    replicated = jax.tree.map(lambda _: P(), jax.eval_shape(clipper.init, {}))
    parts = [  # the clipper gets the parameters as they are, Adam their values
        Partitioned(clipper.init, clipper.update, lambda _: replicated),
        with_partition_fn(adam(1e-2), functools.partial(of_the_same_shape, adam(1e-2))),
    ]
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        (specs, tuple(part.partition(specs) for part in parts)),
    )

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(params):
        boxed = jax.tree.map(OptParam, params)
        return params, tuple(part.init(boxed) for part in parts)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    def step(params, states, x, y):
        loss, updates = jax.value_and_grad(squared_error)(params, x, y)
        boxed = jax.tree.map(OptParam, params)
        after = []
        for part, state in zip(parts, states, strict=True):
            updates, state = part.update(updates, state, boxed)
            after.append(state)
        return optax.apply_updates(params, updates), tuple(after), loss

    params, states = init(new_params())
    losses = []
    for _ in range(10):
        params, states, loss = step(params, states, X, Y)
        losses.append(float(loss))
    return losses


@loop
def keras(lib):
    """Lists of arrays, and an optimizer whose hook clips the gradients."""

    class Momentum:
        rate = 0.01

        def _clip_gradients(self, grads):
            clipper = lib.clip_by_global_norm(0.5)
            return clipper.update(grads, clipper.init(grads))[0]

        def stateless_apply(self, variables, grads, trainable):
            grads = self._clip_gradients(grads)
            speeds = [
                0.9 * v - self.rate * g for v, g in zip(variables, grads, strict=True)
            ]
            return [w + v for w, v in zip(trainable, speeds, strict=True)], speeds

    optimizer = Momentum()

    def loss_fn(trainable, x, y):
        kernel, bias, out = trainable
        return jnp.mean((jnp.tanh(x @ kernel + bias) @ out - y) ** 2)

    @jax.jit
    def train_step(state, x, y):
        trainable, variables = state
        loss, grads = jax.value_and_grad(loss_fn)(trainable, x, y)
        return loss, optimizer.stateless_apply(variables, grads, trainable)

    params = new_params()
    trainable = [params["hidden"]["kernel"], params["hidden"]["bias"]]
    trainable.append(params["out"]["kernel"])
    state = trainable, [jnp.zeros_like(x) for x in trainable]
    losses = []
    for _ in range(10):
        loss, state = train_step(state, X, Y)
        losses.append(float(loss))
    return losses


@loop
def kauldron(lib):
    """Parts with names; the learning rate is a part of its own."""
    tx = optax.named_chain(
        ("clip", lib.clip_by_global_norm(max_norm=0.5)),
        ("adam", optax.scale_by_adam(eps=0.1)),
        ("learning_rate", optax.scale_by_learning_rate(1e-2)),
    )
    return run(tx, new_params())


@loop
def blackjax(lib):
    """Variational inference whose state is a NamedTuple: parameters and optimizer."""
    tx = optax.chain(lib.clip_by_global_norm(0.5), optax.sgd(0.05))

    def kl(params, key):
        mean, rho = params
        z = mean + jnp.exp(rho) * jax.random.normal(key, (16, 2))
        density = -0.5 * jnp.sum((z - jnp.array([4.0, -2.0])) ** 2, axis=1)
        return jnp.mean(-jnp.sum(rho) - density)

    def step(state, key):
        params, inner = state
        value, grads = jax.value_and_grad(kl)(params, key)
        updates, inner = tx.update(grads, inner, params)
        return (optax.apply_updates(params, updates), inner), value

    start = (jnp.zeros(2), jnp.zeros(2))
    keys = jax.random.split(jax.random.key(0), 20)
    return jax.jit(functools.partial(jax.lax.scan, step))(
        (start, tx.init(start)), keys
    )[1]


@loop
def optimistix(lib):
    """A minimiser: a while loop, and extra arguments by keyword."""
    tx = optax.chain(lib.clip_by_global_norm(0.5), adam(0.1))
    tx = optax.with_extra_args_support(tx)

    def rosenbrock(z):
        return (1 - z[0]) ** 2 + 10 * (z[1] - z[0] ** 2) ** 2

    def body(carry):
        i, z, state, values = carry
        value, grads = jax.value_and_grad(rosenbrock)(z)
        updates, state = tx.update(
            grads, state, z, value=value, grad=grads, value_fn=rosenbrock
        )
        return i + 1, optax.apply_updates(z, updates), state, values.at[i].set(value)

    z = jnp.array([-1.2, 1.0])
    start = (jnp.array(0), z, tx.init(z), jnp.zeros(30))
    return jax.jit(
        lambda start: jax.lax.while_loop(lambda carry: carry[0] < 30, body, start)[3]
    )(start)


@loop
def optimistix_line_search(lib):
    """A line search, which calls the function with every argument it does not know."""
    tx = optax.chain(
        lib.clip_by_global_norm(0.5),
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
    )
    tx = lib.apply_if_finite(tx, 5)

    def loss_fn(params, x, y):
        return squared_error(params, x, y)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params, X, Y)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_fn, x=X, y=Y
        )
        return optax.apply_updates(params, updates), state, value

    params = new_params()
    state, losses = tx.init(params), []
    for _ in range(6):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses


@loop
def maxtext(lib):
    """A clipper made in each step, whose state is not one that its init made."""
    tx = adam(1e-2)

    def clipped(grads, state):
        return lib.clip_by_global_norm(0.5).update(grads, state, None)[0]

    @jax.jit
    def step(state, x, y):
        loss, grads = jax.value_and_grad(squared_error)(state.params, x, y)
        return state.apply_gradients(grads=clipped(grads, state)), loss

    state = TrainState.create(apply_fn=mlp, params=new_params(), tx=tx)
    losses = []
    for _ in range(10):
        state, loss = step(state, X, Y)
        losses.append(float(loss))
    return losses


@loop
def dreamerv3(lib):
    """All state in one flat dictionary of arrays, put together anew in each step."""
    tx = optax.chain(
        lib.adaptive_grad_clip(0.3), optax.scale_by_rms(eps=0.1), optax.scale(-1e-2)
    )
    shapes = jax.eval_shape(lambda p: (p, tx.init(p)), new_params())
    tree = jax.tree.structure(shapes)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(shapes)
    ]

    @jax.jit
    def step(flat, x, y):
        params, state = jax.tree.unflatten(tree, [flat[name] for name in names])
        loss, grads = jax.value_and_grad(squared_error)(params, x, y)
        updates, state = tx.update(grads, state, params)
        after = jax.tree.leaves((optax.apply_updates(params, updates), state))
        return dict(zip(names, after, strict=True)), loss

    params = new_params()
    flat = dict(zip(names, jax.tree.leaves((params, tx.init(params))), strict=True))
    losses = []
    for _ in range(10):
        flat, loss = step(flat, X, Y)
        losses.append(float(loss))
    return losses


@functools.cache
def our_losses(name):
    return LOOPS[name](OURS)


@pytest.mark.one_in(8, rest="slow")
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_the_losses_are_those_of_optax(name):
    theirs, ours = LOOPS[name](optax), our_losses(name)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_clipping_changes_the_losses(name):
    """Else the comparison with optax would show nothing."""
    clipped, free = our_losses(name), LOOPS[name](NONE)
    assert not np.allclose(clipped, free, rtol=1e-2, atol=0)
