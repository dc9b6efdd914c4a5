"""Trains a transformer with FSDP and tensor parallelism, clipped across the mesh.

The text is Python's own language reference, from the standard library. Without a GPU
or TPU eight CPU devices stand for the mesh:

    python examples/fsdp_transformer.py
    python examples/fsdp_transformer.py --processes 2  # processes of four devices
    python examples/fsdp_transformer.py --compare      # 1 device, 8, and 2 processes

On a cluster every host runs the same line (docs/meshes.md):

    python examples/fsdp_transformer.py --distributed
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from progress import bar_of
from transformer import Transformer, batches, loss_of, text

import optax_clipx as clipx


def main():
    """Parses the command line and runs one training or several."""
    args = parser().parse_args()
    if args.compare:
        compare(args)
    elif args.processes > 1 and args.process_id is None:
        launch(args)
    else:
        connect(args)
        train(args)


def parser():
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=16, help="sequences a step")
    add("--length", type=int, default=64, help="bytes a sequence")
    add("--dim", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--max-norm", type=float, default=0.5, help="threshold of the global norm")
    add("--learning-rate", type=float, default=3e-3)
    add("--devices", type=int, default=8, help="CPU devices, of all processes")
    add("--model-axis", type=int, default=2, help="devices of tensor parallelism")
    add("--processes", type=int, default=1, help="processes on this machine")
    add("--distributed", action="store_true", help="one of several hosts")
    add("--coordinator", help="host:port of process 0, if it is not found by itself")
    add("--process-id", type=int, help="number of this process, likewise")
    add("--compare", action="store_true", help="1 device, all devices, 2 processes")
    add("--output", type=Path, help="JSON file for the loss and norm of each step")
    return options


def connect(args):
    """Sets up the devices before any is used."""
    jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
    if args.distributed or args.process_id is not None:
        told = (args.coordinator, args.processes, args.process_id)
        jax.distributed.initialize(*(told if args.coordinator else ()))


def train(args):
    """Trains on all devices and reports."""
    num_devices = len(jax.devices())
    tensor = min(args.model_axis, num_devices)
    if num_devices % tensor or args.batch_size % (num_devices // tensor):
        raise SystemExit(
            f"error: {num_devices} devices cannot hold --model-axis {tensor} and"
            f" --batch-size {args.batch_size}: the first must divide the devices, and"
            " the rest of the devices the batch."
        )
    mesh = jax.make_mesh((num_devices // tensor, tensor), ("data", "model"))
    jax.set_mesh(mesh)
    first = jax.process_index() == 0
    if first:
        platform = jax.devices()[0].platform
        print(f"{num_devices} {platform} devices, mesh {dict(mesh.shape)}")

    model, optimizer = create(args)
    tokens = batches(text(), args.batch_size, args.length)
    log = []
    with bar_of(total=args.steps, disable=not first, unit="step") as bar:
        for _ in range(args.steps):
            loss, clipped = train_step(model, optimizer, on_mesh(mesh, next(tokens)))
            log.append([float(loss), float(clipped["clip/norm"])])
            bar.set_postfix(loss=f"{log[-1][0]:.3f}", norm=f"{log[-1][1]:.2f}")
            bar.update()
    if first:
        number = int(clipped["clip/num_clipped"])
        print(
            f"loss {log[0][0]:.3f} -> {log[-1][0]:.3f} nats a byte;"
            f" norm {log[-1][1]:.2f};"
            f" clipped {number} of {args.steps} steps at {args.max_norm}"
        )
        print(
            f"\nThe gradients on {num_devices} devices were clipped by one norm, that"
            " of the whole model.\nWith --compare you see that one device gives the"
            " same losses up to rounding."
        )
        if args.output:
            losses, norms = zip(*log, strict=True)
            args.output.write_text(json.dumps({"loss": losses, "norm": norms}))


def create(args):
    """The model, sharded as its weights say, and its optimizer."""
    model = Transformer(args.dim, args.layers, args.heads, args.length, nnx.Rngs(0))
    tx = optax.chain(
        clipx.clip_by_global_norm(args.max_norm), optax.adamw(args.learning_rate)
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, tokens):
    """One step: the loss, and what the clipper did."""
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss, clipx.metrics(optimizer.opt_state)


def on_mesh(mesh, batch):
    """A batch that every process has, each holding its own part on the mesh."""
    return jax.make_array_from_callback(
        batch.shape, NamedSharding(mesh, P("data")), lambda index: batch[index]
    )


def launch(args):
    """Starts several processes on this machine and waits for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    line = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    running = [subprocess.Popen([*line, str(i)]) for i in range(args.processes)]
    failed = [process.wait() for process in running]
    if any(failed):
        raise SystemExit(f"error: the processes ended with {failed}")


def compare(args):
    """The same training on one device, on all, and in two processes."""
    common = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(args).items()
        if name not in ("compare", "output", "devices", "processes", "distributed")
        and value is not None
    ]
    layouts = {
        "1 device": ["--devices=1"],
        f"{args.devices} devices": [f"--devices={args.devices}"],
        "2 processes": [f"--devices={args.devices}", "--processes=2"],
    }
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in layouts.items():
            print(f"\n{name}")
            output = Path(folder, "log.json")
            line = [sys.executable, __file__, *common, *layout, f"--output={output}"]
            subprocess.run(line, check=True)
            losses[name] = np.array(json.loads(output.read_text())["loss"])
    alone = losses["1 device"]
    print(f"\n{'':12} {'last loss':>10} {'largest difference':>19}")
    for name, loss in losses.items():
        print(f"{name:12} {loss[-1]:10.5f} {np.max(np.abs(loss - alone)):19.1e}")
    if args.output:
        found = {name: loss.tolist() for name, loss in losses.items()}
        args.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
