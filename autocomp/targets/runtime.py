"""What targets on this machine's CPU share: timing against the anchor, verification, peak memory.

A runtime adds how a model is opened and written, and its recipes; see `onnxruntime_cpu`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from autocomp.core.errors import InternalError
from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.hashing import content_key
from autocomp.core.measurement import Measurement
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit, UnitFormat
from autocomp.targets.clock import Clock, Run
from autocomp.targets.fingerprint import describe_cpu
from autocomp.targets.generation import feeds, first_tokens
from autocomp.targets.load_memory import Loading
from autocomp.targets.peak_memory import peak_bytes_alone
from autocomp.targets.protocol import Artifact, ExportTask, Workload
from autocomp.targets.timing import Reference, Timing, undisturbed

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from autocomp.targets.cost_table import CostTable
    from autocomp.targets.lower import Recipes
    from autocomp.targets.mixer_nodes import Seats
    from autocomp.targets.weights import Provider

Array = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """A model that is loaded and can be run, in the terms of ONNX Runtime."""

    def get_inputs(self) -> Sequence[Any]:
        """Inputs, each with `name` and `shape`; dimensions that vary are no integers."""
        ...

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names, all of them without."""
        ...


class CpuTarget(ABC):
    """A model in a runtime on this machine's CPU.

    Latency is in reference milliseconds: the model's time over the anchor's, times what the
    anchor took when `reference` was recorded. Without a `reference` the first measurement
    records one; pass it on to every process whose figures shall be comparable.

    Where the workload generates, latency is that of the token in the middle of the generation,
    which stands for all: the cost of attending is affine in the tokens in the cache. Kernels are
    chosen for it; `run` reads whole sequences, with an empty cache, through the same graph.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    lowering_version: ClassVar[int]
    """Raised when lowered graphs change in speed or bytes: earlier cost tables no longer apply."""
    warm_runs: ClassVar[int] = 0
    """Runs of a piece right before each that is timed; see `time_round_robin`."""

    def __init__(
        self,
        workload: Workload,
        device: str = "cpu",
        gate: Gate = NO_GATE,
        reference: Reference | None = None,
    ) -> None:
        if device != "cpu":
            raise InternalError(f"{self.name} measures on this machine's cpu, not {device!r}")
        self.workload = workload
        self.gate = gate
        self.reference = reference
        self._open: tuple[tuple[str, int, int], Session] | None = None

    # -- what a runtime adds

    loading: ClassVar[Loading]
    """What loading a format takes."""

    @property
    @abstractmethod
    def recipes(self) -> Recipes:
        """How the runtime writes each kind of site."""

    @abstractmethod
    def runtime(self) -> str:
        """Name and version of the runtime."""

    @abstractmethod
    def open(self, model: Path | onnx.ModelProto) -> Session:
        """A session as a deployment opens it, on the workload's threads."""

    @abstractmethod
    def anchor(self) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
        """The model that timings are compared with, and its inputs."""

    @abstractmethod
    def write(self, lowered: onnx.ModelProto, directory: Path) -> Artifact:
        """See `Target.write`."""

    def bound(self, session: Session, feed: Mapping[str, Array]) -> Run:
        """A function that runs a session on `feed`, with as little around it as can be."""
        return partial(session.run, None, feed)

    def lowered_bytes(self, lowered: onnx.ModelProto) -> int:
        """Bytes on disk of a lowered model."""
        return int(lowered.ByteSize())

    # -- what follows from it

    @property
    def tokens(self) -> int:
        """Tokens per timed run; an image is taken for at least 64 patches."""
        if self.decodes:
            return self.workload.batch
        image = getattr(self.workload, "image", None)
        return self.workload.batch * max(self.workload.sequence, 64 if image else 1)

    @property
    def decodes(self) -> bool:
        """Whether the workload generates: graphs then have a key-value cache."""
        return self.workload.generate is not None

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache of a timed run."""
        return (self.workload.prompt or 0) + (self.workload.generate or 0) // 2

    def describe(self) -> dict[str, Any]:
        """Device, runtime, version, workload."""
        workload = {
            name: getattr(self.workload, name)
            for name in ("batch", "sequence", "image", "prompt", "generate", "threads")
            if getattr(self.workload, name, None) is not None
        }
        return {
            "target": self.name,
            "runtime": self.runtime(),
            **describe_cpu(),
            "workload": workload,
        }

    def fingerprint(self) -> str:
        """Hash of `describe` and of the lowering's version."""
        return content_key({**self.describe(), "lowering": self.lowering_version})

    def formats_supported(self, format: SiteFormat) -> str | None:
        """Why this format cannot be lowered, or `None` if it can."""
        if format.mixer is not None and self.decodes:
            from autocomp.targets.mixer_profile import undecodable

            if (reason := undecodable(format.mixer)) is not None:
                return reason
        if format.cache_bits != 32 and not self.decodes:
            return (
                "keeps no cache, as the workload generates no tokens: leave bits.cache out, or "
                "write workload: {prompt: 128, generate: 32}"
            )
        return self.recipes.unsupported(format, self.tokens)

    def tokens_supported(self, reduction: TokenReduction, tokens: int) -> str | None:
        """Why this token reduction gains nothing, or `None`; all can be lowered."""
        if reduction.removed(tokens):
            return None
        return (
            f"gains nothing from a ratio of {reduction.ratio:g}, which removes none of "
            f"{tokens} tokens"
        )

    def size_bytes(self, format: SiteFormat) -> int:
        """Bytes on disk of one site in this format."""
        return self.recipes.size_bytes(format, self.tokens)

    def load_bytes(self, format: SiteFormat) -> tuple[str, float]:
        """See `Target.load_bytes`."""
        recipe = self.recipes.recipe(format, self.tokens)
        return self.loading.part(format, recipe, self.size_bytes(format))

    @property
    def idle_memory_bytes(self) -> float:
        """See `Target.idle_memory_bytes`."""
        return self.loading.idle_bytes

    def export(self, model: nn.Module, units: Sequence[Unit], task: ExportTask) -> onnx.ModelProto:
        """The skeleton of a dense model (seconds); see `skeleton_store` to keep it."""
        from autocomp.targets.skeleton import export_skeleton

        return export_skeleton(model, units, task, decode=self.decodes)

    def lower(
        self, skeleton: onnx.ModelProto, model: nn.Module, units: Sequence[Unit]
    ) -> onnx.ModelProto:
        """The graph of a stitched model; units that were skipped in it leave no node."""
        from autocomp.models.tokens import model_reductions
        from autocomp.targets.mixer_nodes import student_seats
        from autocomp.targets.weights import model_parameters, model_weights

        reductions = model_reductions(model)
        return self.lower_weights(
            skeleton,
            model_weights(model),
            model_parameters(model),
            reductions,
            student_seats(skeleton, model, units, reductions),
        )

    def lower_weights(
        self,
        skeleton: onnx.ModelProto,
        weights: Provider,
        parameters: Mapping[str, Array] | None = None,
        reductions: Mapping[str, TokenReduction] | None = None,
        seats: Seats | None = None,
    ) -> onnx.ModelProto:
        """`lower` from a provider of weights instead of a torch model."""
        from autocomp.targets.lower import lower

        return lower(
            skeleton,
            weights,
            tokens=self.tokens,
            parameters=parameters,
            reductions=reductions,
            seats=seats,
            recipes=self.recipes,
        )

    def run(self, artifact: Artifact, inputs: Mapping[str, Array]) -> Array:
        """Logits for a batch of whole sequences; the last artifact's session is kept open."""
        session = self._session(artifact.path)
        (logits,) = session.run(["logits"], feeds(session, artifact.feeds(inputs)))
        return np.asarray(logits)

    def verify(self, artifact: Artifact, model: nn.Module, inputs: Mapping[str, Array]) -> float:
        """Largest absolute difference between the artifact's logits and torch's, at real tokens."""
        import torch

        with torch.no_grad():
            expected = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
        found = self.run(artifact, inputs)
        if expected.shape != found.shape:
            raise InternalError(f"logits are {found.shape}, torch's are {expected.shape}")
        difference = np.abs(expected - found)
        mask = inputs.get("attention_mask")
        if mask is not None and difference.ndim == 3:
            difference = difference[mask.astype(bool)]
        return float(difference.max())

    def measure(self, artifact: Artifact, inputs: Mapping[str, Array]) -> Measurement:
        """Latency at the workload, alone on the machine while the gate is held; and size."""
        with self.gate.working():
            session = self.open(artifact.path)
        inputs = artifact.feeds(inputs)
        anchor_ms = self._recorded().anchor_ms
        timed = partial(self.time_session, session, inputs, rounds=10, seconds=1.0)
        timing = undisturbed(timed, anchor_ms)
        prefill = None
        if self.workload.prompt is not None:
            feed = feeds(session, first_tokens(inputs, self.workload.prompt))
            timed = partial(self._clock.time, self.bound(session, feed))
            prefill = self.to_ms(undisturbed(timed, anchor_ms))
        return Measurement(
            provenance="measured",
            latency_ms=self.to_ms(timing),
            size_bytes=artifact.size_bytes,
            latency_wall_ms=timing.wall_ms,
            latency_spread=timing.spread,
            device=self.fingerprint(),
            prefill_ms=prefill,
        )

    def time_graph(
        self, model: onnx.ModelProto, inputs: Mapping[str, Array], **settings: Any
    ) -> Timing:
        """Time a graph in memory; `settings` go to `time_interleaved`."""
        session = self.open(model)
        return self.time_session(session, inputs, **settings)

    def time_session(
        self, session: Session, inputs: Mapping[str, Array], **settings: Any
    ) -> Timing:
        """Time an open session against the anchor, a token's run where the workload generates."""
        feed = self._timed_feed(session, inputs)
        return self._clock.time(self.bound(session, feed), **settings)

    def _timed_feed(self, session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One token per example and a filled cache, where the workload generates."""
        if not self.decodes:
            return feeds(session, inputs)
        batch = self.workload.batch
        if "input_ids" in inputs:
            inputs, batch = first_tokens(inputs, 1), len(inputs["input_ids"])
        return feeds(session, inputs, batch, self.cached_tokens)

    def time_pieces(
        self, pieces: Sequence[tuple[onnx.ModelProto, Mapping[str, Array]]], **settings: Any
    ) -> list[Timing]:
        """Time many small graphs against each other and the anchor, each with its inputs."""
        runs = []
        for model, inputs in pieces:
            session = self.open(model)
            runs.append(self.bound(session, self._timed_feed(session, inputs)))
        return self._clock.time_all(runs, warm=self.warm_runs, **settings)

    def to_ms(self, timing: Timing) -> float:
        """Reference milliseconds of a timing; the first one records the reference."""
        return timing.ratio * self._recorded().anchor_ms

    def _recorded(self) -> Reference:
        return self.reference or self.record_reference()

    def record_reference(self, seconds: float = 3.0) -> Reference:
        """Time the anchor alone, at the machine's best within `seconds`, and go by it.

        Limits in milliseconds stand or fall with it: what ran right before may take a second to go.
        """
        self.reference = Reference(self._clock.anchor_ms(seconds), self.fingerprint())
        return self.reference

    def run_graph(
        self, model: onnx.ModelProto, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Values of some tensors of a graph in memory, in a run as it is timed."""
        session = self.open(model)
        values = session.run(list(outputs), self._timed_feed(session, inputs))
        return dict(zip(outputs, (np.asarray(value) for value in values), strict=True))

    def profile(
        self,
        skeleton: onnx.ModelProto,
        units: Sequence[Unit],
        unit_formats: Mapping[str, Mapping[str, UnitFormat]],
        inputs: Mapping[str, Array],
        *,
        reductions: Mapping[str, Mapping[str, TokenReduction]] | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> CostTable:
        """See `profile.profile`."""
        from autocomp.targets.profile import profile

        return profile(
            self,
            skeleton,
            units,
            unit_formats,
            inputs,
            reductions=reductions,
            seed=seed,
            progress=progress,
        )

    def peak_memory(self, artifact: Artifact, inputs: Mapping[str, Array]) -> int:
        """Peak resident bytes of a fresh process that loads the artifact and runs it once.

        Where the workload generates, the process reads the prompt and generates after it.

        Raises:
            MachineError: if that process is killed.
            InternalError: if it fails, with the end of what it said.
        """
        feed = artifact.feeds(inputs)
        if self.workload.prompt is not None:
            feed = first_tokens(feed, self.workload.prompt)
        opener, tokens = type(self).open.__module__, self.workload.generate or 0
        with self.gate.working():  # seconds, but nothing that can be interrupted
            return peak_bytes_alone(
                opener, artifact.path, feed, threads=self.workload.threads, tokens=tokens
            )

    @cached_property
    def _clock(self) -> Clock:
        with self.gate.working():
            model, inputs = self.anchor()
            anchor = self.bound(self.open(model), inputs)
        return Clock(anchor, self.gate, single_threaded=self.workload.threads == 1)

    def _session(self, path: Path) -> Session:
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if self._open is None or self._open[0] != key:
            self._open = (key, self.open(path))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_open": None}
        state.pop("_clock", None)  # holds the anchor's session
        return state
