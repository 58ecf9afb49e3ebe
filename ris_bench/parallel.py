"""Several processes of one machine share the work of a trial, each with a GPU of its own or, without GPUs, with a core.

The first is the trial's own and leads: it starts the others, which do as it does with their share of the rows, and
which end when it ends, whatever ends it. They talk over the loopback interface only.

How many they are is a placement: they normalise over the rows of all and sum the gradients of all, so that no number
changes beyond rounding. Only dropout is drawn apart in each.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ris_bench.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""For one process to wait for another: longer than a checkpoint takes on a slow disk. One that has died is noticed at
once."""
BUCKET_BYTES = 2**25
"""Of gradients that are sent at a time."""
LAST_WORDS_SECONDS = 10
"""For a process that has failed to say why."""


class MemoryElsewhereError(MemoryError):
    """The memory of another process was not enough."""


class ProcessDiedError(RuntimeError):
    """One of the processes is gone without a word."""


class Team:
    """One of the processes, and what it does together with the others: all call the same methods in the same order.

    A team of one does nothing.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.careful = False
        """Whether one process may run out of memory where the others go on to their next `sum` or `stack`. With it they
        ask each other first, and raise MemoryElsewhereError where one answers by `all_fit(False)`."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Those of rows 0, 1, ... that are this process's: every `size`-th, so that any part of them is shared too."""
        return rows[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        """Put the sum over all processes in the place of each tensor; they have one dtype and device."""
        if self.size == 1:
            return
        self._beware()
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors (...) of all processes: (size, ...)."""
        if self.size == 1:
            return tensor[None]
        self._beware()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return torch.stack(found)

    def gather(self, item: Any) -> list[Any]:
        """What every process gives, which can be pickled, in the order of their ranks."""
        found = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(found, item)
        return found

    def told(self, item: Any = None) -> Any:
        """What the leader gives, which can be pickled."""
        found = [item]
        if self.size > 1:
            dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others do what is in the block when the leader has done it."""
        if not self.leads:
            self.told()
        yield
        if self.leads:
            self.told()

    def all_fit(self, fits: bool) -> bool:
        """Whether the memory of every process was enough."""
        if self.size == 1:
            return fits
        short = torch.tensor(not fits, dtype=torch.int32)
        dist.all_reduce(short)
        return not short.item()

    def _beware(self) -> None:
        if self.careful and not self.all_fit(True):
            raise MemoryElsewhereError("the memory of another process was not enough")


ALONE = Team()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def batch_norms(team: Team, present: bool) -> Iterator[None]:
    """Within it, in the forward and the backward pass, whatever normalises by the batch does so by the rows of all.

    Running means and variances move as in one process that has all rows, by the same numbers in every process. If not
    `present`, the rows of this process stand in for none, and count for nothing.

    PyTorch's SyncBatchNorm does this for modules on GPUs.
    """
    if team.size == 1:
        yield
        return
    with _BatchNorms(team, present) as norms:
        token = _NORMS.set(norms)
        try:
            yield
        finally:
            _NORMS.reset(token)


def same_batch_norms() -> AbstractContextManager[Any]:
    """The `batch_norms` that holds here, for what is computed again in the backward pass, where PyTorch lifts it."""
    return _NORMS.get() or nullcontext()


class _BatchNorms(TorchFunctionMode):
    def __init__(self, team: Team, present: bool) -> None:
        super().__init__()
        self.team, self.present = team, present

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            function = self._batch_norm
        return function(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        y, mean_C, var_C, total = _Normalised.apply(x, weight, bias, eps, self)
        if running_mean is not None:
            running_mean.lerp_(mean_C.to(running_mean), momentum)
            running_var.lerp_((var_C * total / (total - 1)).to(running_var), momentum)  # the unbiased one
        return y


_NORMS: ContextVar[_BatchNorms | None] = ContextVar("batch_norms", default=None)


class _Normalised(torch.autograd.Function):
    """x (B, C, ...) normalised over all but C and over all processes; its mean, variance and number of elements."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float, norms: _BatchNorms
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, over = _wide(x), _all_but_channels(x)
        var_C, mean_C = torch.var_mean(wide, over, correction=0)
        number_1 = mean_C.new_full((1,), norms.present * x.numel() / x.shape[1])
        # Means and variances, whose sums do not cancel as those of squares do.
        own = torch.cat([mean_C, var_C, number_1]).double()
        mean_RC, var_RC, number_R1 = norms.team.stack(own).split([len(mean_C), len(mean_C), 1], dim=1)
        total = number_R1.sum()
        mean_C = (number_R1 * mean_RC).sum(0) / total
        var_C = (number_R1 * (var_RC + (mean_RC - mean_C).square())).sum(0) / total
        mean_C, var_C, total = (each.to(wide.dtype) for each in (mean_C, var_C, total))
        ctx.save_for_backward(x, weight_C, mean_C, (var_C + eps).rsqrt(), total)
        ctx.norms = norms
        ctx.mark_non_differentiable(mean_C, var_C, total)
        y = F.batch_norm(x, mean_C, var_C, weight_C, bias_C, eps=eps)
        return y, mean_C, var_C, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *nothing: Any) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, rate_C, total = ctx.saved_tensors
        norms, over = ctx.norms, _all_but_channels(x)
        column = (-1, *[1] * (x.dim() - 2))
        normed, dy = (_wide(x) - mean_C.view(column)) * rate_C.view(column), _wide(dy)
        dbias_C, dweight_C = dy.sum(over), (dy * normed).sum(over)
        sums_2C = torch.stack([dbias_C, dweight_C])
        norms.team.sum(sums_2C)
        dx = None
        if ctx.needs_input_grad[0]:
            through_2C = sums_2C / total * norms.present  # what stands in has moved no statistics
            scale_C = rate_C if weight_C is None else rate_C * weight_C
            dx = (dy - through_2C[0].view(column) - normed * through_2C[1].view(column)) * scale_C.view(column)
            dx = dx.to(x.dtype)
        dweight_C = dweight_C.to(weight_C.dtype) if ctx.needs_input_grad[1] else None
        dbias_C = dbias_C.to(mean_C.dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight_C, dbias_C, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


@contextmanager
def team(size: int, work: Callable[..., None], *args: Any) -> Iterator[Team]:
    """Lead a team: every other process calls `work(team, *args)`, which is pickled for it.

    They are gone when the block is left. What one of them raises is raised here, as soon as this process waits for it;
    a ProcessDiedError is where one died. Raises UserError where there are fewer GPUs than processes.
    """
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        raise UserError(
            f"a trial of {size} processes needs as many GPUs, and {torch.cuda.device_count()} can be seen; give fewer"
        )
    with tempfile.TemporaryDirectory(prefix="ris-bench-") as folder:
        others = _Others(size, folder, work, args)
        try:
            others.start()
            _join(0, size, folder)
            yield Team(0, size)
            dist.destroy_process_group()
            others.join()
        except RuntimeError:
            others.explain(LAST_WORDS_SECONDS)
            raise
        finally:
            others.end()
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(rank: int, size: int, folder: str) -> None:
    # Nobody on the network has a part in it.
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


class _Others:
    """The processes that are led."""

    def __init__(self, size: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._size = size
        self._given = (size, folder, work, args)
        self._started: list[tuple[BaseProcess, Connection]] = []
        self._errors: queue.Queue[BaseException] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._ends = False

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
        resource_tracker.ensure_running()  # it would take away the mask
        # Who presses Ctrl-C, or sends SIGTERM to all, asks the leader, and the others go on until it ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for rank in range(1, self._size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_follow, args=(theirs, rank, *self._given))
                process.start()
                theirs.close()  # or it would not be told of its end
                self._started.append((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for rank, (_, pipe) in enumerate(self._started, start=1):
            try:
                pipe.recv()
            except (EOFError, OSError):
                raise self._death(rank) from None
        self._listener.start()

    def join(self) -> None:
        """Wait until they are done, which they are soon."""
        self._listener.join()
        self.explain(0)

    def explain(self, seconds: float) -> None:
        """Raise what one of them has raised, or raises within so many seconds."""
        with suppress(queue.Empty):
            raise self._errors.get(timeout=seconds if self._listener.is_alive() else 0)

    def end(self) -> None:
        self._ends = True
        for process, _ in self._started:
            process.kill()
        for process, _ in self._started:
            process.join()
        if self._listener.is_alive():
            self._listener.join(LAST_WORDS_SECONDS)
        for _, pipe in self._started:
            pipe.close()

    def _listen(self) -> None:
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._started, start=1)}
        while ranks:
            with suppress(OSError):
                for pipe in connection.wait(list(ranks)):
                    rank = ranks.pop(pipe)
                    try:
                        error = pipe.recv()
                    except (EOFError, OSError):
                        error = self._death(rank)
                    if error and not self._ends:
                        self._errors.put(error)
                        if torch.cuda.is_available():
                            # On a GPU what waits for a process that is gone would wait for ever.
                            dist.distributed_c10d._abort_process_group()
            if self._ends:
                return

    def _death(self, rank: int) -> ProcessDiedError:
        process, _ = self._started[rank - 1]
        process.join(LAST_WORDS_SECONDS)
        how = f"exit code {process.exitcode}"
        if process.exitcode is not None and process.exitcode < 0:
            how = f"by {signal.Signals(-process.exitcode).name}"
        return ProcessDiedError(f"process {rank + 1} of {self._size} of the trial died ({how})")


def _follow(
    pipe: Connection, rank: int, size: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """All that another process does."""

    def end_with_the_leader() -> None:
        with suppress(EOFError, OSError):
            pipe.recv()
        shutil.rmtree(folder, ignore_errors=True)  # one that was killed has left it
        os._exit(1)

    threading.Thread(target=end_with_the_leader, daemon=True).start()
    pipe.send("here")
    try:
        _join(rank, size, folder)
        work(Team(rank, size), *args)
        dist.destroy_process_group()
        pipe.send(None)
    except Exception as error:
        if isinstance(error, RuntimeError):
            time.sleep(1)  # it may have come of another process's end, which then has the first word
        pipe.send(_portable(error, f"in process {rank + 1} of {size}:\n{traceback.format_exc()}"))


class _Portable:
    """An error that becomes itself again, with its traceback as its cause, where it is unpickled."""

    def __init__(self, error: Exception, text: str) -> None:
        self._error, self._text = error, text

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_cause, (self._error, self._text)


def _with_cause(error: Exception, text: str) -> Exception:
    error.__cause__ = ChildProcessError(text)
    return error


def _portable(error: Exception, text: str) -> _Portable:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Portable(error, text)
