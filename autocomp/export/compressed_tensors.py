"""Export in the compressed-tensors format, which vLLM serves: decoders whose linear layers are
rounded to 8 or 4 bits.

Codes and scales are the trial's, bit for bit. Every quantised linear layer of a block is named in a
config group of its scheme; layers left dense, and the table and the head (as floats), are in
`ignore`. Scaled inputs are folded into what precedes them, exactly: into the norm, or into the rows
of the value or up projection. Where activations are quantised at run time the format does so token
by token, the trial over the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.core.activation_grid import static_grid
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.export.card import model_card
from autocomp.export.directory import fill_companions, write_directory
from autocomp.export.huggingface import inexpressible
from autocomp.export.protocol import ExportRequest, Verification
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Target

if TYPE_CHECKING:
    import torch

    from autocomp.export.structure import Structure
    from autocomp.operators.protocol import SiteState

GROUPS = (32, 64, 128)
"""Columns that may share a scale; or the whole row."""

_FUSED = (("query", "key", "value"), ("gate", "up"))
"""Roles that a server computes as one layer: they need one scheme."""

_LOAD = """\
from vllm import LLM  # or transformers: AutoModelForCausalLM.from_pretrained(".")

print(LLM(".").generate("She opened the door and")[0].outputs[0].text)
"""
_REMARK = (
    "Measured on the trial's artifact for the target, not on these files, which are for vLLM and "
    "transformers. Codes and scales of the blocks are the trial's; table and head are floats."
)
_TOKENS = (
    "Activations are rounded to 8 bits with a range per token here, per tensor in the trial: "
    "logits differ a little."
)


@dataclass(frozen=True, order=True)
class Scheme:
    """How one linear layer is stored and run. `group` 0 is the whole row."""

    bits: int
    group: int
    activations: str

    def to_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """A config group."""
        weights: dict[str, Any] = {"strategy": "channel"}
        if self.group:
            weights = {"strategy": "group", "group_size": self.group}
        inputs: dict[str, Any] | None = None
        if self.activations:
            dynamic = self.activations == "dynamic"
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": False,
                "strategy": "token" if dynamic else "tensor",
                "dynamic": dynamic,
            }
        return {
            "targets": list(targets),
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                **weights,
            },
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }

    @property
    def format(self) -> str:
        """Name of the compression format."""
        return "int-quantized" if self.activations else "pack-quantized"


class CompressedTensorsExporter:
    """Writes packed or int8 weights and a `quantization_config`."""

    name = "compressed-tensors"
    summary = "Packed 4- and 8-bit or int8 weights of a decoder, as vLLM loads them."
    expresses = (
        "decoders: 8 or 4 bits per row or group of 32, 64, 128; 8-bit weights per row with 8-bit "
        "activations; pruning as huggingface; not 3 or 2 bits, low rank, replaced attention, "
        "Conv1D layers (GPT-2)"
    )

    def supports(self, record: TrialRecord) -> str | None:
        """See `Exporter.supports`."""
        return inexpressible(record)

    def write(self, request: ExportRequest, directory: Path) -> None:
        """See `Exporter.write`."""
        if (reason := self.supports(request.record)) is not None:
            raise UserError(f"cannot export as {self.name}: {reason}")
        if request.spec.task.name != "language-modeling":
            raise UserError(
                f"cannot export as {self.name}: the task is {request.spec.task.name}, and this "
                f"format is for decoders that generate. Use --format huggingface, or leave it out"
            )
        if find_spec("compressed_tensors") is None:
            raise UserError(
                f"--format {self.name} is verified with a package that is not installed: "
                f"pip install 'autocomp[compressed-tensors]'"
            )
        from safetensors.torch import save_file

        from autocomp.library.student import load_student

        assert request.student is not None
        student, units = load_student(request.student)
        structure, schemes, tensors = compress(student, units)
        remarks = [_REMARK, *structure.notes]
        if any(scheme.activations == "dynamic" for scheme in schemes.values()):
            remarks.append(_TOKENS)
        card = model_card(request, "model.safetensors", _LOAD, remarks)
        structure.config.quantization_config = quantization_config(structure, schemes)

        def fill(temporary: Path) -> None:
            structure.config.save_pretrained(temporary)
            save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
            fill_companions(request, temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")

        write_directory(directory, fill)

    def verify(self, request: ExportRequest, directory: Path, target: Target) -> Verification:
        """See `Exporter.verify`. Compared are the weights: activations stay floats."""
        from autocomp.export.reloaded import verify_reload

        return verify_reload(request, directory, target)


def compress(
    student: Any, units: Sequence[Unit]
) -> tuple[Structure, dict[str, Scheme], dict[str, torch.Tensor]]:
    """Structure, scheme of every quantised linear layer, and all tensors of the file.

    Raises:
        UserError: naming the first unit that cannot be expressed, and why.
    """
    from autocomp.export.fold import fold_input_scales
    from autocomp.export.structure import cannot, load_weights, stock_structure
    from autocomp.library.student import unit_state
    from autocomp.models.surgery import model_layout

    layout = model_layout(student)
    inside = [unit for unit in units if unit.layer is not None]
    name = CompressedTensorsExporter.name
    if layout.transposed:
        raise cannot(name, inside[0], f"{layout.model_type} has Conv1D layers")
    groups = {1}
    for unit in inside:
        forms = {end: state.format for end, state in unit_state(student, unit).items()}
        for end, form in forms.items():
            if (reason := _unserved(form)) is not None:
                raise cannot(name, unit, f"{end} has {reason}")
            groups.add(form.group or 1)
        for roles in _FUSED:
            ends = [site.name for site in unit.sites if site.role in roles]
            if len({_scheme(forms[end]) for end in ends if end in forms}) > 1:
                raise cannot(name, unit, f"{', '.join(roles)} are rounded in different ways")
    structure = stock_structure(
        student, units, "language-modeling", name, multiple=math.lcm(*groups)
    )
    structure, norms = fold_input_scales(structure, layout, inside, name)
    tensors = dict(load_weights(structure, student).state_dict())
    for norm, factor in norms.items():
        tensors[norm] = tensors[norm] * factor
    if getattr(structure.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    schemes: dict[str, Scheme] = {}
    for unit in inside:
        for site in unit.sites:
            for place, original in structure.names.items():
                if original != site.name or place not in structure.states:
                    continue
                scheme = _scheme(structure.states[place].format)
                if scheme is None:
                    continue
                columns = structure.shapes[place][1]
                if scheme.group and columns % scheme.group:
                    what = f"{columns} columns are no multiple of the group {scheme.group}"
                    raise cannot(name, unit, f"{site.name}: {what}")
                schemes[place] = scheme
                del tensors[f"{place}.weight"]
                packed = _packed(structure.states[place], structure.shapes[place], scheme)
                tensors |= {f"{place}.{part}": tensor for part, tensor in packed.items()}
    if not schemes:
        raise UserError(
            f"cannot export as {name}: no linear layer of this trial is quantised. Use --format "
            f"huggingface"
        )
    return structure, schemes, {k: v.detach().contiguous() for k, v in tensors.items()}


def quantization_config(structure: Structure, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group per scheme, its layers named."""
    groups: dict[str, Any] = {}
    for index, scheme in enumerate(sorted(set(schemes.values()))):
        targets = [place for place, its in schemes.items() if its == scheme]
        groups[f"group_{index}"] = scheme.to_json(targets)
    formats = {scheme.format for scheme in schemes.values()}
    dense = [
        place
        for place in structure.shapes
        if place not in schemes and place.rpartition(".")[2] != "embed_tokens"
    ]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def _unserved(form: SiteFormat) -> str | None:
    """Why a linear layer in this format cannot be served, or `None`."""
    if form.weight_bits == 32:
        return None
    if form.weight_bits not in (8, 4):
        return f"{form.weight_bits}-bit weights"
    if form.group is not None and form.group not in GROUPS:
        return f"groups of {form.group} columns (allowed: {', '.join(map(str, GROUPS))}, the row)"
    if form.activation_bits == 8 and (form.weight_bits != 8 or form.group is not None):
        return "8-bit activations without 8-bit weights per row"
    return None


def _scheme(form: SiteFormat) -> Scheme | None:
    if form.weight_bits == 32:
        return None
    activations = ("static" if form.static else "dynamic") if form.activation_bits == 8 else ""
    return Scheme(form.weight_bits, form.group or 0, activations)


def _packed(site: SiteState, shape: tuple[int, int], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Tensors of one layer, as large as `shape`; what is added has code 0 and scale 1."""
    import torch

    from autocomp.export.structure import fill_up

    assert site.codes is not None
    assert site.scales is not None
    rows, columns = shape
    groups = columns // scheme.group if scheme.group else 1
    scales = torch.ones(rows, groups)
    scales[: site.scales.shape[0], : site.scales.shape[1]] = site.scales
    codes = fill_up(site.codes, shape)
    found = {"weight_scale": scales}
    if scheme.format == "int-quantized":
        found["weight"] = codes
    else:
        found["weight_packed"] = pack(codes, scheme.bits)
        found["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    if site.input_range is not None:
        scale, zero_point = static_grid(*site.input_range)
        found["input_scale"] = torch.tensor([scale], dtype=torch.float32)
        found["input_zero_point"] = torch.tensor([zero_point - 128], dtype=torch.int8)
    return found


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 `(rows, columns)` → int32 `(rows, ceil(columns · bits / 32))`, lowest first.

    Codes are stored from zero: plus 8 at 4 bits, plus 128 at 8. Rows are filled up with zero bits.
    """
    import torch

    rows, columns = codes.shape
    per_word = 32 // bits
    words = -(-columns // per_word)
    values = torch.zeros(rows, words * per_word, dtype=torch.int64)
    values[:, :columns] = codes.to(torch.int64) + (1 << (bits - 1))
    shifts = torch.arange(per_word) * bits
    packed = (values.view(rows, words, per_word) << shifts).sum(dim=2)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


EXPORTER = CompressedTensorsExporter()
