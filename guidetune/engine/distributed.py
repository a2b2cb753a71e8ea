"""Several processes on one run: data parallel, or with the model's decoder layers sharded (FSDP2).

Every rank makes the same decisions from the same inputs, so what is exchanged is small:

- control: Python objects and float64 tables over a gloo group of its own that waits as long as it takes (rank 0 may write for an
  hour), so that no accelerator collective ever times out behind a file;
- gradients: one flat fp32 sum after the last micro-batch of an optimiser batch. LoRA gradients are small and wanted once per
  step: the hooks and buckets of DistributedDataParallel would only add collectives, and trouble with parameters that one rank
  did not use;
- parameters: with FSDP2 the decoder layers are sharded (`fully_shard`). Embeddings, final norm and head stay whole on every device:
  the fused loss needs the whole head while it runs, so gathering it once per step has the same peak and costs a collective. A
  trainable part that is small beside the layers (LoRA) stays whole too and takes the flat sum; a large one (full tuning) is
  sharded with them and its gradients are reduce-scattered.

An error on one rank becomes the same error on all of them (`agree`), at the next point where they meet. Where they cannot meet
(inside a sharded layer) the process ends, and the launcher ends the others.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import nn

from guidetune import processes
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import say

T = TypeVar("T")
P = TypeVar("P")
PATIENCE = timedelta(days=7)
BUCKET = 1 << 26  # gradient elements summed at a time: 256 MB in fp32
INTERRUPTED = "interrupted"
SMALL_PART = 0.5  # a trainable part below this share of the layers stays whole on every rank


class Lost(RunFailed):
    """Another process of this run has ended."""


def everywhere(error: BaseException) -> bool:
    """Whether every rank has raised this error, so that all may go on after it together."""
    return current().size == 1 or getattr(error, "on_every_rank", False)


@dataclass
class Group:
    """The processes of a run. With one process every method does its work and nothing else."""

    rank: int = 0
    processes: int = 1
    device: torch.device | None = None
    sharding: Any = None  # accelerate's FullyShardedDataParallelPlugin, or None
    control: Any = None  # the gloo group for objects
    interrupted: bool = False
    _alone: int = field(default=0, repr=False)

    @property
    def size(self) -> int:
        return 1 if self._alone else self.processes

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def lockstep(self) -> bool:
        """Whether all ranks must run the same number of forward and backward passes (layers are gathered inside them)."""
        return self.sharding is not None and self.size > 1

    @property
    def loading_device(self) -> str:
        """Where a model is loaded before `place`: a model to be sharded may not fit a device whole."""
        return "cpu" if self.lockstep else "auto"

    # -- exchange -----------------------------------------------------------------------------------------------------

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, in order of rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with _losing():
            torch.distributed.all_gather_object(out, value, group=self.control)
        return out

    def exchange_with_main(self, value: T) -> list[T]:
        """Every rank's value on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        out: list[Any] | None = [None] * self.size if self.main else None
        with _losing():
            torch.distributed.gather_object(value, out, dst=0, group=self.control)
        return out or []

    def broadcast(self, value: T | None = None) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        with _losing():
            torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def total(self, values: np.ndarray, failure: BaseException | None = None) -> np.ndarray:
        """Element-wise sum over ranks in float64; raises as `agree` when some rank brings a failure.

        Where only one rank's entry is not 0, that entry arrives bit for bit.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return values
        table = torch.from_numpy(np.concatenate([[float(failure is not None)], np.asarray(values, dtype=np.float64).ravel()]))
        with _losing():
            torch.distributed.all_reduce(table, group=self.control)
        if float(table[0]) > 0:
            self._raise(failure)
        return table[1:].numpy().reshape(np.shape(values))

    # -- errors -------------------------------------------------------------------------------------------------------

    def agree(self, failure: BaseException | None) -> None:
        """Meet the other ranks; raise on all of them when some have a failure."""
        self.total(np.zeros(0), failure)

    def _raise(self, failure: BaseException | None) -> NoReturn:
        found = self.exchange(_packed(failure))
        first = next(rank for rank, one in enumerate(found) if one is not None)
        interrupted = next((one for one in found if one is not None and one[0] == INTERRUPTED), None)
        raise _on_all(failure if first == self.rank else None, interrupted or found[first], first)

    def agreed(self, work: Callable[[], T]) -> T:
        """This rank's `work()`, which meets no other rank; an error of any rank is raised on all."""
        if self.size == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        self.agree(failure)
        return result  # type: ignore[return-value]

    def once(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone, as if it were the only process; every rank gets its result, or its error."""
        if self.size == 1:
            return work()
        result, failure = None, None
        if self.main:
            self._alone += 1
            try:
                result = work()
            except (Exception, KeyboardInterrupt) as error:
                failure = error
            finally:
                self._alone -= 1
        result, packed = self.broadcast((result, _packed(failure)))
        if packed is not None:
            raise _on_all(failure, packed, 0)
        return result

    def follow(self, lead: Callable[[Callable[[Any], Any]], T], build: Callable[[Any], Any]) -> T:
        """`lead(build)` on rank 0; when it calls `build(x)`, all ranks run it together. Every rank gets lead's result."""
        if self.size == 1:
            return lead(build)
        if not self.main:
            own: BaseException | None = None
            while True:
                what, value = self.broadcast()
                if what == "done":
                    return value
                if what == "failed":
                    raise own if own is not None else _on_all(None, value, 0)
                try:
                    build(value)
                except BaseException as error:
                    if not everywhere(error):
                        raise
                    own = error

        def together(value: Any) -> Any:
            self._alone -= 1
            try:
                self.broadcast(("build", value))
                return build(value)
            except BaseException as error:
                if not everywhere(error):  # the others are not listening
                    error.on_this_rank = True  # type: ignore[attr-defined]
                raise
            finally:
                self._alone += 1

        self._alone += 1
        try:
            result = lead(together)
        except BaseException as error:
            self._alone -= 1
            if getattr(error, "on_this_rank", False):
                raise
            packed = _packed(error)
            self.broadcast(("failed", packed))
            assert packed is not None
            shared = _on_all(error, packed, 0)
            raise shared from shared.__cause__
        self._alone -= 1
        self.broadcast(("done", result))
        return result

    # -- who does what ------------------------------------------------------------------------------------------------

    def turns(self, owners: Sequence[int]) -> list[tuple[int, bool]]:
        """(index, real) of the pieces this rank runs, in order. In lockstep a rank with fewer repeats one without counting it."""
        if self.size == 1:
            return [(k, True) for k in range(len(owners))]
        own = [(k, True) for k, owner in enumerate(owners) if owner == self.rank]
        if self.lockstep and owners:
            most = max(np.bincount(owners, minlength=self.size))
            own += [(own[0][0] if own else 0, False)] * (most - len(own))
        return own

    def share(self, pieces: list[T], costs: Sequence[float]) -> list[T]:
        """The pieces this rank runs; in lockstep all of them, because every rank takes part in every forward pass."""
        if self.size == 1 or self.lockstep:
            return pieces
        return [piece for piece, owner in zip(pieces, balanced(costs, self.size), strict=True) if owner == self.rank]

    def dealt(self, pieces: Sequence[P], costs: Sequence[float], work: Callable[[P], T]) -> list[T]:
        """`work` of every piece, on every rank; each rank does its share."""
        if self.size == 1 or self.lockstep:
            return [work(piece) for piece in pieces]
        owners = balanced(costs, self.size)
        own = self.agreed(lambda: {k: work(pieces[k]) for k, owner in enumerate(owners) if owner == self.rank})
        found = {k: result for part in self.exchange(own) for k, result in part.items()}
        return [found[k] for k in range(len(pieces))]

    # -- gradients ----------------------------------------------------------------------------------------------------

    def sum_gradients(self, params: Sequence[torch.Tensor]) -> None:
        """Replace every whole gradient by its sum over ranks, in fp32; sharded ones were summed in the backward pass."""
        if self.size == 1:
            return
        whole = [p for p in params if p.requires_grad and not is_sharded(p)]
        there = torch.tensor([float(p.grad is not None) for p in whole], device=whole[0].device if whole else None)
        with _losing():
            if len(whole):
                torch.distributed.all_reduce(there)
            used = [p for p, ranks in zip(whole, there.tolist(), strict=True) if ranks > 0]
            for p in used:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            for bucket in _buckets([p.grad for p in used], BUCKET):  # type: ignore[misc]
                flat = torch.cat([g.reshape(-1).float() for g in bucket])
                torch.distributed.all_reduce(flat)
                for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(part.view_as(g))

    def gradient_norm(self, params: Sequence[torch.Tensor]) -> float:
        """√Σ g² over all trainable parameters, the same on every rank."""
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return 0.0
        norms = [n.float() for n in torch._foreach_norm([local(g) for g in grads])]
        apart = np.array([is_sharded(g) for g in grads])
        if not apart.any():
            return float(torch.linalg.vector_norm(torch.stack(norms)))
        squares = np.array([float(n) ** 2 for n in norms])  # one by one: offloaded shards lie on another device
        return float(np.sqrt(squares[~apart].sum() + self.total(squares[apart].sum(keepdims=True))[0]))

    def optimiser_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups with sharded and whole tensors apart: the optimiser's kernels take one kind at a time."""
        out = []
        for group in groups:
            sharded = [p for p in group["params"] if is_sharded(p)]
            if not sharded:
                out.append(group)
                continue
            whole = [p for p in group["params"] if not is_sharded(p)]
            out += [{**group, "params": sharded, "fused": False, "foreach": True}] + ([{**group, "params": whole}] if whole else [])
        return out

    # -- interruptions ------------------------------------------------------------------------------------------------

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM set `interrupted`, so that all ranks stop between two micro-batches; a second one acts at once."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}

        def note(sign: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        for sign in before:
            signal.signal(sign, note)
        try:
            yield
            if self.interrupted:
                raise KeyboardInterrupt
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    # -- placement ----------------------------------------------------------------------------------------------------

    def place(self, model: nn.Module) -> None:
        """Shard the model's decoder layers over the ranks, one after the other; what is not a layer goes to this rank's device whole.

        Raises:
            BadInput: the model's decoder layers cannot be told.
        """
        if not self.lockstep or any(is_sharded(p) for p in model.parameters()):
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        from guidetune.models.architecture import plain

        assert self.device is not None
        backbone = plain(model).base_model
        layers = _layers(plain(model), self.sharding.transformer_cls_names_to_wrap)
        inside = {p for layer in layers for p in layer.parameters()}
        trained = {p for p in inside if p.requires_grad}
        keep_whole = sum(p.numel() for p in trained) < SMALL_PART * sum(p.numel() for p in inside)
        options = _fully_shard_options(self.sharding, self.device)
        options["mesh"] = init_device_mesh(self.device.type, (self.size,))
        for layer in layers:
            self._materialise(layer)
            whole = {p for p in layer.parameters() if p.requires_grad} if keep_whole else set()
            fully_shard(layer, ignored_params=whole, **options)
        self._materialise(model)
        # The backbone owns nothing that is sharded: it is the root that lets one layer's gathering overlap the one before.
        shards = {p for layer in layers for p in layer.parameters() if is_sharded(p)}
        fully_shard(backbone, ignored_params={p for p in backbone.parameters() if p not in shards}, **options)
        for module in backbone.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum: the loss's denominator divides, once
                module.set_force_sum_reduction_for_comms(True)

    def _materialise(self, module: nn.Module) -> None:
        """Move whole parameters and buffers to this rank's device; with RAM-efficient loading only rank 0 has read them."""
        seen: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is None or is_sharded(p):
                    continue
                if id(p) not in seen:  # tied parameters stay one
                    made = torch.empty_like(p, device=self.device) if p.is_meta else p.data.to(self.device)
                    if self.sharding.cpu_ram_efficient_loading:
                        with _losing():
                            torch.distributed.broadcast(made, src=0)
                    if p.is_meta:
                        seen[id(p)] = nn.Parameter(made, requires_grad=p.requires_grad)
                    else:
                        p.data = made
                        seen[id(p)] = p
                part._parameters[name] = seen[id(p)]
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = b.to(self.device)


_current = Group()
_started = False


def current() -> Group:
    """The processes of this run; joins them on the first call when a launcher started several.

    Raises:
        BadInput: the launch asks for something that is not supported.
    """
    global _current, _started
    if not _started and processes.count() > 1:
        _started = True
        _current = _join()
    return _current


def _join() -> Group:
    from accelerate import PartialState

    cpu = _flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if not cpu and torch.cuda.device_count() <= processes.local_rank():
        raise BadInput(
            f"process {processes.local_rank()} of this machine has no GPU of its own ({torch.cuda.device_count()} found);"
            " start at most one process per GPU, or set use_cpu: true in the accelerate config"
        )
    sharding = _sharding()
    deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate would load its engine, which is not used
    try:
        state = PartialState(cpu=cpu)
    finally:
        if deepspeed is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = deepspeed
    control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Group(state.process_index, state.num_processes, state.device, sharding, control)


def _sharding() -> Any:
    """accelerate's FSDP settings when the launch asks for sharded parameters, else None."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", ""):
        say("note: the launch's mixed_precision is not used; tune.dtype decides the precision")
    if _flag("ACCELERATE_USE_MEGATRON_LM") or _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise BadInput("tensor, context and pipeline parallel launches are not supported; use data parallel or FSDP2 (docs/distributed.md)")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = _zero_stage()
        how = "shards the layers with PyTorch's FSDP2, as stage 3 would" if stage == "3" else "runs data parallel, nothing is sharded"
        say(f"note: DeepSpeed ZeRO-{stage} was asked for; guidetune does not use DeepSpeed's engine and {how}")
        if stage != "3":
            return None
        if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none":
            raise BadInput("offload_param_device is not supported under DeepSpeed; use an FSDP2 launch with fsdp_offload_params: true")
        return _plugin(fsdp_version=2, cpu_offload=False, cpu_ram_efficient_loading=False)
    if not _flag("ACCELERATE_USE_FSDP"):
        return None
    plugin = _plugin()
    if plugin.fsdp_version != 2:
        raise BadInput("the launch asks for FSDP version 1; set fsdp_version: 2 under fsdp_config of the accelerate config")
    if plugin.activation_checkpointing:
        say("note: fsdp_activation_checkpointing is not used; set tune.gradient_checkpointing in the recipe")
    return plugin


def _zero_stage() -> str:
    """DeepSpeed's ZeRO stage, of the launch's options or of its own configuration file."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path:
        try:
            stage = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
        except (OSError, ValueError, AttributeError) as error:
            raise BadInput(f"the launch's DeepSpeed configuration {path} cannot be read: {error}") from None
        if isinstance(stage, int):
            return str(stage)
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


def _plugin(**options: Any) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    try:
        return FullyShardedDataParallelPlugin(**options)
    except (ValueError, KeyError, ImportError) as error:
        raise BadInput(f"the launch's FSDP settings cannot be used: {error}") from None


def _fully_shard_options(plugin: Any, device: torch.device) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

    return {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": OffloadPolicy() if device.type == "cpu" else plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }


def _layers(model: nn.Module, names: Sequence[str] | str | None) -> list[nn.Module]:
    """The decoder layers, by the launch's class names or those the architecture declares indivisible."""
    wanted = [names] if isinstance(names, str) else list(names or getattr(model, "_no_split_modules", None) or [])
    found = [m for m in model.base_model.modules() if type(m).__name__ in wanted]
    if not found:
        raise BadInput(
            f"{type(model).__name__}: no decoder layer of class {', '.join(wanted) or '(none named)'} to shard;"
            " name it in fsdp_transformer_layer_cls_to_wrap"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Small parts


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each piece: the dearest first, each to the rank with the least so far (ties: the lower rank)."""
    load = [0.0] * ranks
    owner = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owner[k] = min(range(ranks), key=lambda r: (load[r], r))
        load[owner[k]] += costs[k]
    return owner


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor (a view), or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; every rank must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`full` laid out as `like`: the same shard of it where `like` is sharded. No communication."""
    full = full.to(device=like.device, dtype=like.dtype if full.is_floating_point() else None)
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return part.to(local(like).device)


def full_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights whole, on the CPU of rank 0 (empty elsewhere); None when nothing is sharded. Every rank must call it."""
    state = model.state_dict()
    if not any(is_sharded(t) for t in state.values()):
        return None
    main = current().main
    out: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        full = whole(tensor).detach()
        if main:  # tied tensors stay one
            out[name] = full.cpu() if is_sharded(tensor) else seen.setdefault(full.data_ptr(), full.cpu())
    return out


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _buckets(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > limit:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").strip().lower() in ("1", "true", "yes", "on")


def _packed(error: BaseException | None) -> tuple[str, list[str]] | None:
    if error is None:
        return None
    if isinstance(error, BadInput):
        return "bad input", error.problems
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, []
    return "failed", [str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}".rstrip(": ")]


def _on_all(own: BaseException | None, packed: tuple[str, list[str]], rank: int) -> BaseException:
    """What every rank raises for the failure of one: of the same kind everywhere, so that all go on or none."""
    kind, lines = packed
    where = f"rank {rank}: " if rank else ""
    error: BaseException
    if kind == INTERRUPTED:
        error = KeyboardInterrupt()
    elif isinstance(own, (BadInput, RunFailed)):
        error = own
    else:
        error = BadInput([where + line for line in lines]) if kind == "bad input" else RunFailed(where + "\n".join(lines))
        error.__cause__ = own
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


@contextmanager
def _losing() -> Iterator[None]:
    """A collective fails when a peer is gone; say that instead of the transport's words."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"another process of this run has ended ({str(error).splitlines()[0][:200]})") from error
