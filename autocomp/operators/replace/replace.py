"""Replace: another mixer in the place of softmax attention, distilled layer by layer.

One operator for all of `autocomp.models.mixers`: a step names the mixer. The projections that the
mixer reads and the output projection stay linear layers, so bits and sparsity apply to them as
before; what is not read is gone. See `distil` beside this file for the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.models.mixers import MIXERS
from autocomp.operators.protocol import Rule, Stage, UnitState, UnitStats

if TYPE_CHECKING:
    from autocomp.models.mixers.protocol import Mixer


class Replace:
    """Put the mixer `mixer` in the place of softmax attention."""

    name = "replace"
    summary = "Replace softmax attention by another mixer, trained on the unit's own inputs."
    paper = "Bick et al., 2024, MOHAWK, arXiv:2408.10189"
    choices = "structure.replace: names of mixers (autocomp ls mixers); at_most: units replaced"
    stage: Stage = "structure"
    version = 2
    trains = True
    speeds_up: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")
    shrinks: tuple[str, ...] = ()

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Leave attention as it is, or replace it by one of the mixers.

        Raises:
            UserError: at a unit that is no attention, for an unknown mixer, or one that cannot
                stand in this unit.
        """
        if "replace" not in rule.structure:
            return []
        if unit.kind != "attention":
            raise UserError(
                f"replace at {unit.name}: a unit of kind {unit.kind} holds no attention to "
                f"replace. Match layers.*.attention only"
            )
        from autocomp.models.seat import mixer_shape

        names = rule.structure["replace"]
        if not isinstance(names, list | tuple) or not names:
            raise UserError(
                f"replace at {unit.name}: must be a list of mixers, not {names!r}. Available: "
                f"{', '.join(MIXERS.names())}. See: autocomp ls mixers"
            )
        steps: dict[Step, None] = {}
        for name in names:
            reason = MIXERS.get(name).refuses(mixer_shape(unit))
            if reason is not None:
                raise UserError(
                    f"replace at {unit.name}: {name} cannot stand there: {reason}. Leave it out, "
                    f"or match other units"
                )
            steps[Step.of("replace", mixer=name)] = None
        return [None, *steps]

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """The projections that are read, and the output, which names the mixer."""
        mixer = _mixer(step)
        result: dict[str, SiteFormat] = {}
        for site in unit.sites:
            if site.role == "output":
                result[site.name] = replace(formats[site.name], mixer=mixer.name)
            elif site.role in mixer.reads:
                result[site.name] = formats[site.name]
        return result

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Start from what the attention's weights say, then train on its recorded inputs.

        Raises:
            InternalError: if nothing was recorded of the unit.
        """
        from autocomp.calibrate.record import load_recording
        from autocomp.calibrate.stats import RecordedStats
        from autocomp.operators.replace.distil import distil

        if not isinstance(stats, RecordedStats):
            raise InternalError(f"{unit.name}: its attention's inputs were not recorded")
        trained, mixer = distil(unit, state, _mixer(step), load_recording(stats.recording))
        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result: UnitState = {}
        for name, form in formats.items():
            weight, bias = trained[name]
            result[name] = replace(state[name], weight=weight, bias=bias, format=form)
            if form.mixer is not None:
                result[name].mixer = mixer
        return result

    def step_version(self, step: Step) -> int:
        """The mixer's."""
        return _mixer(step).version


def _mixer(step: Step) -> type[Mixer]:
    return MIXERS.get(str(step["mixer"]))


OPERATOR = Replace()
