"""Local distillation: what stands for attention learns what it did, on the unit's inputs. Torch.

The target is what the sublayer adds to the residual stream, behind its output projection; the loss
is the squared error relative to the target's energy. What is new (a mixer, pooled keys and values)
and inherited projections are trained together, the latter at a tenth of the rate, by AdamW under a
cosine with warm-up. The
rate is found: each of `rates` trains a short schedule of its own from the same start, and the one
of least error on held-out sequences is used; while that is the lowest or the highest tried, one
beyond it is tried too. The state of least held-out error is kept, whichever run left it, the start
included, and its output projection refitted in closed form. Everything is seeded; only the clock,
which is noted when it strikes, can end a run elsewhere. A run it ends is looked at once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.calibrate.accumulate import Accumulator
from autocomp.calibrate.record import Call, Recording
from autocomp.core.errors import ModelError
from autocomp.core.unit import Role, Unit
from autocomp.models.mixers.protocol import Mixer
from autocomp.models.seat import mixer_shape
from autocomp.operators.gram import damped, damping_for, inverse
from autocomp.operators.protocol import LocalTraining, MixerState, SiteStats, UnitState
from autocomp.operators.replace.examples import (
    CHUNK_TOKENS,
    SEED,
    Example,
    examples_of,
    in_steps,
)
from autocomp.operators.replace.sublayer import Layers, Sublayer


@dataclass(frozen=True)
class Settings:
    """How a sublayer is trained.

    Attributes:
        steps, warm_up: of the whole run.
        step_tokens: real tokens a step; fewer where there are fewer.
        rates: tried for what is new; inherited projections get `inherited` of it.
        trial_steps: steps each rate is tried for.
        held_out: one sequence in this many is not trained on.
        check_every: steps between looks at held-out sequences.
        patience: looks without a better state, after which a run ends.
        seconds: wall time after which it ends; trials share `TRIAL_SHARE` of it evenly.
    """

    steps: int = 300
    warm_up: int = 20
    step_tokens: int = 4096
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    inherited: float = 0.1
    trial_steps: int = 20
    held_out: int = 8
    check_every: int = 25
    patience: int = 4
    seconds: float = 600.0


SETTINGS = Settings()
RATE_FACTOR, FURTHER = 3.0, 2
"""Where the best rate is an outermost one: what to go on by, and how often."""

TRIAL_SHARE = 1 / 3
MAX_GRAD_NORM = 1.0
EXACT = 1e-6
"""What starts with no more error than this (a window over whole texts) is not trained."""


@dataclass
class _Run:
    """What one training run found: the best state, its held-out error, and the way there."""

    error: float = math.inf
    state: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    steps: int = 0
    ended: str = "steps"


def distil(
    unit: Unit,
    state: UnitState,
    mixer: type[Mixer],
    recording: Recording,
    settings: Settings | None = None,
) -> tuple[Layers, MixerState, LocalTraining]:
    """Train `mixer` in the place of the attention of `unit`: `train`, and the mixer it leaves."""
    weights: dict[Role, Tensor] = {site.role: state[site.name].weight for site in unit.sites}
    seated: list[Mixer] = []

    def prepare(student: Sublayer, examples: Sequence[Call]) -> nn.Module:
        seated.append(mixer.inherit(mixer_shape(unit), weights))
        student.seat(seated[0])
        _calibrate(student, seated[0], examples)
        return seated[0]

    layers, training = train(unit, state, recording, prepare, settings)
    parameters = {name: value.detach().clone() for name, value in seated[0].state_dict().items()}
    return layers, MixerState(mixer.name, seated[0].shape, parameters), training


def train(
    unit: Unit,
    state: UnitState,
    recording: Recording,
    prepare: Callable[[Sublayer, Sequence[Call]], nn.Module],
    settings: Settings | None = None,
) -> tuple[Layers, LocalTraining]:
    """Train what `prepare` makes of the attention of `unit` to do what the attention does.

    Args:
        state: the dense unit.
        recording: what its attention was called with.
        prepare: changes a dense sublayer, given the calls it will be trained on, and returns what
            is new in it; the other projections are inherited.

    Returns:
        The projections that are left, and how training went, with the statistics of what the output
        projection reads now. The curve in the report holds (step, training error, held-out error);
        errors are relative to the energy of the target, ‖ŷ − y‖² / ‖y − b‖². `curve` and `steps`
        are of the run whose state is kept, `ended` says what ended the whole run.

    Raises:
        ModelError: if what the attention gives is not finite.
    """
    settings = settings or SETTINGS
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        teacher = Sublayer(recording, unit, state)
        seen, held = examples_of(teacher, recording.calls, settings.held_out)
        if not all(bool(torch.isfinite(one.target[one.real]).all()) for one in [*seen, *held]):
            raise ModelError(
                f"{unit.name}: what its attention gives is not finite on the calibration examples: "
                f"its weights hold NaN or infinity, or it overflows"
            )
        student = Sublayer(recording, unit, state)
        new = prepare(student, [example.call for example in seen])
        trainer = _Trainer(student, new, seen, held, settings, started)
        run, tried = trainer.best_run()
        trainer.restore(run.state)
        error = trainer.refit_output(run.error)
        stats = _output_stats(student, recording.calls)
    return student.layers(), LocalTraining(
        stats=stats,
        report={
            "error_before": trainer.start_error,
            "error_trained": run.error,
            "error": error,
            "rate": _best(tried) if tried else None,
            "rates": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
            "steps": run.steps,
            "ended": run.ended,
            "seconds": round(time.perf_counter() - started, 2),
            "tokens": sum(example.tokens for example in seen),
            "held_out_tokens": sum(example.tokens for example in held),
            "curve": run.curve,
        },
    )


class _Trainer:
    """Trains a student from the same start as often as asked."""

    def __init__(
        self,
        student: Sublayer,
        new: nn.Module,
        train: Sequence[Example],
        held: Sequence[Example],
        settings: Settings,
        started: float,
    ) -> None:
        self._student, self._settings, self._started = student, settings, started
        self._train, self._held = train, held or train
        self._module = nn.ModuleList([new, *student.projections().values()])
        self._new = [p for p in new.parameters() if p.is_floating_point()]
        known = {id(parameter) for parameter in new.parameters()}
        self._old = [p for p in self._module.parameters() if id(p) not in known]
        self._bias = None if student.output.bias is None else student.output.bias.detach().clone()
        self._energy = self._mean_energy(train), self._mean_energy(self._held)
        self.start = self._snapshot()
        self.start_error = self._error()

    @torch.no_grad()
    def refit_output(self, error: float) -> float:
        """Give the output projection its best weight, if held-out sequences agree; their error.

        Least squares on what it reads now, drawn towards the weight that is there as compensation
        after pruning is: W + Σ (y − ŷ) zᵀ (G + λI)⁻¹, G = Σ z zᵀ, in float64. `error` is that of
        now.
        """
        output = self._student.output
        gram = torch.zeros(output.in_features, output.in_features, dtype=torch.float64)
        cross = torch.zeros(output.out_features, output.in_features, dtype=torch.float64)
        seen: list[Tensor] = []
        handle = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for example in self._train:
            found = self._student.run(example.call)
            z = seen.pop()[example.real].double()
            gram += z.t() @ z
            cross += (example.target.float() - found)[example.real].double().t() @ z
        handle.remove()
        if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            return error
        tokens = sum(example.tokens for example in self._train)
        before = output.weight.detach().clone()
        change = cross @ inverse(damped(gram, damping_for(output.in_features, tokens)))
        output.weight += change.float()
        refitted = self._error()
        if refitted < error:
            return refitted
        output.weight.copy_(before)
        return error

    def best_run(self) -> tuple[_Run, dict[float, float]]:
        """The best of the whole run and of the trials; rate → held-out error after its trial."""
        settings = self._settings
        if self.start_error < EXACT:
            return _Run(self.start_error, self.start, ended="exact"), {}
        trials = self._trials()
        tried = {rate: run.error for rate, run in trials.items()}
        rate = _best(tried) if tried else settings.rates[0]
        end = self._started + settings.seconds
        whole = self._run(rate, settings.steps, settings.check_every, end)
        best = min([whole, *trials.values()], key=lambda run: run.error)
        return replace(best, ended=whole.ended), tried

    def _trials(self) -> dict[float, _Run]:
        """A short run at each rate, and beyond the outermost ones while those are the best."""
        settings = self._settings
        if len(settings.rates) < 2:
            return {}
        share = TRIAL_SHARE * settings.seconds
        end, one = time.perf_counter() + share, share / (len(settings.rates) + FURTHER)
        trials: dict[float, _Run] = {}
        rates = list(settings.rates)
        while rates and time.perf_counter() < end:
            rate, steps = rates.pop(0), settings.trial_steps
            trials[rate] = self._run(rate, steps, steps, time.perf_counter() + one)
            if not rates and len(trials) < len(settings.rates) + FURTHER:
                best = _best({rate: run.error for rate, run in trials.items()})
                if best == max(trials):
                    rates.append(best * RATE_FACTOR)
                elif best == min(trials):
                    rates.append(best / RATE_FACTOR)
        return trials

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a snapshot back."""
        self._module.load_state_dict(state)

    def _run(self, rate: float, steps: int, check_every: int, end: float) -> _Run:
        """From the start; when the clock shows `end`, it ends with the step it is at."""
        settings = self._settings
        self.restore(self.start)
        run = _Run(self.start_error, self.start, [(0, math.nan, self.start_error)])
        groups = [(self._new, 1.0), (self._old, settings.inherited)]
        optimiser = torch.optim.AdamW(
            [{"params": params, "lr": rate * share} for params, share in groups if params],
            weight_decay=0.0,
        )
        peaks = [float(group["lr"]) for group in optimiser.param_groups]
        draws = in_steps(self._train, settings.step_tokens)
        warm_up = max(1, min(settings.warm_up, steps // 5))
        waited, summed, since = 0, 0.0, 0
        for step in range(steps):
            share = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            loss = self._step(optimiser, next(draws))
            run.steps = step + 1
            if not math.isfinite(loss):
                run.ended = "diverged"
                break
            summed, since = summed + loss, since + 1
            last, late = step + 1 == steps, time.perf_counter() > end
            if (step + 1) % check_every and not last and not late:
                continue
            error = self._error()
            run.curve.append((step + 1, summed / since, error))
            summed, since = 0.0, 0
            if error < run.error:
                run.error, run.state, waited = error, self._snapshot(), 0
            else:
                waited += 1
            if waited >= settings.patience:
                run.ended = "patience"
                break
            if late and not last:
                run.ended = "clock"
                break
        return run

    def _step(self, optimiser: torch.optim.Optimizer, examples: Sequence[Example]) -> float:
        """One step on these examples; their relative error before it."""
        optimiser.zero_grad(set_to_none=True)
        scale = 1.0 / (self._energy[0] * sum(example.tokens for example in examples))
        total = 0.0
        for example in examples:
            loss = self._squared(example) * scale
            torch.autograd.backward(loss)
            total += float(loss.detach())
        if math.isfinite(total):
            nn.utils.clip_grad_norm_([*self._new, *self._old], MAX_GRAD_NORM)
            optimiser.step()
        return total

    def _squared(self, example: Example) -> Tensor:
        found = self._student.run(example.call)
        return (found - example.target.float())[example.real].square().sum()

    @torch.no_grad()
    def _error(self) -> float:
        """Relative error on held-out sequences; infinite where it is no number."""
        error = sum(float(self._squared(example)) for example in self._held)
        error /= self._energy[1] * sum(example.tokens for example in self._held)
        return error if math.isfinite(error) else math.inf

    def _mean_energy(self, examples: Sequence[Example]) -> float:
        """Mean ‖y − b‖² of a real token, above zero."""
        total = 0.0
        for example in examples:
            y = example.target.float()[example.real]
            total += float((y if self._bias is None else y - self._bias).square().sum())
        return max(total / max(sum(example.tokens for example in examples), 1), 1e-12)

    def _snapshot(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self._module.state_dict().items()}


def _best(errors: dict[float, float]) -> float:
    """The rate of least error, and of those the lowest."""
    return min(errors, key=lambda rate: (errors[rate], rate))


@torch.no_grad()
def _calibrate(student: Sublayer, mixer: Mixer, calls: Sequence[Call]) -> None:
    """Show a mixer the inputs it will be trained on."""
    seen: list[tuple[Any, ...]] = []
    handle = mixer.register_forward_pre_hook(lambda _, args: seen.append(args))
    student.run(max(calls, key=lambda call: int(call.lengths.sum())))
    handle.remove()
    mixer.calibrate(*seen[0])


@torch.no_grad()
def _output_stats(student: Sublayer, calls: Sequence[Call]) -> SiteStats:
    """Of what the output projection reads now, over every recorded token."""
    name = next(site.name for site in student.unit.sites if site.role == "output")
    accumulator = Accumulator({name: student.output})
    for call in calls:
        height = max(1, CHUNK_TOKENS // call.hidden.shape[1])
        for index in torch.split(torch.arange(len(call.hidden)), height):
            part = call.rows(index)
            with accumulator.watching(part.real):
                student.run(part)
    return accumulator.stats([name])[name]
