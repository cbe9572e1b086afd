"""A sentence-transformers module whose feed-forward layers have experts; saved models carry a copy.

Their folder holds a dense model as its main files (expert-choice routing needs the dense linears; the other
routers leave the experts' mean there), and beside it ``moe.json`` and ``moe.safetensors``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from sentence_transformers.sentence_transformer.modules import Transformer

from .moe import Layout, moe_layers, note_mask, upcycle  # relative: also right inside a model's folder

LAYOUT_FILE, EXPERTS_FILE = "moe.json", "moe.safetensors"
_FILE_KEYS = ("subfolder", "token", "cache_folder", "revision", "local_files_only")


class MoETransformer(Transformer):  # type: ignore[misc]
    """A ``Transformer`` with experts in its backbone (``moe.upcycle``)."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        note_mask(self.model, features.get("attention_mask"))
        result: dict[str, Any] = super().forward(features, **kwargs)
        return result

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the module, safetensors only, and the code that plain sentence-transformers loads it with."""
        layers = moe_layers(self.model)
        tensors = self.model.state_dict()
        experts = {}
        for name, layer in layers.items():
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                value = tensors.pop(key)
                if ".dense." not in key.removeprefix(name):
                    experts[key] = value.contiguous()
            dense = layer.merged() if layer.dense is None else layer.dense
            tensors |= {f"{name}.{key}": value for key, value in dense.state_dict().items()}
        self.model.save_pretrained(output_path, state_dict=tensors)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)
        folder = Path(output_path)
        layout = next(iter(layers.values())).layout
        (folder / LAYOUT_FILE).write_text(json.dumps(vars(layout), indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(experts, folder / EXPERTS_FILE, {"format": "pt"})
        here = Path(__file__).parent
        for source in ("moe.py", "moe_transformer.py"):
            if (here / source).resolve() != (folder / source).resolve():
                shutil.copyfile(here / source, folder / source)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> "MoETransformer":
        """Called by sentence-transformers. Raises ``ValueError`` where experts are missing."""
        found = {}
        for name in (LAYOUT_FILE, EXPERTS_FILE):
            files = {key: kwargs[key] for key in _FILE_KEYS if key in kwargs}
            found[name] = cls.load_file_path(model_name_or_path, name, **files)
            if found[name] is None:
                raise ValueError(f"no {name} in {model_name_or_path}")
        module: MoETransformer = super().load(model_name_or_path, **kwargs)
        given = json.loads(Path(found[LAYOUT_FILE]).read_text(encoding="utf-8"))
        layers = None if given["layers"] is None else tuple(given["layers"])
        module.give_experts(Layout(**{**given, "layers": layers}))
        module.put_experts(safetensors.torch.load_file(found[EXPERTS_FILE]))
        return module

    def give_experts(self, layout: Layout, *, seed: int = 0, noise: float = 0.0) -> None:
        """Upcycle the backbone. Texts stay apart: routing within a text must see where one ends."""
        upcycle(self.model, layout, seed=seed, noise=noise)
        if layout.router == "expert_choice":
            self.unpad_inputs = False

    @torch.no_grad()
    def put_experts(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill experts and routers. Raises ``ValueError`` unless the tensors are exactly theirs."""
        parameters = {
            f"{name}.{key}": parameter
            for name, layer in moe_layers(self.model).items()
            for key, parameter in layer.named_parameters()
            if not key.startswith("dense.")
        }
        wrong = sorted(parameters.keys() ^ tensors.keys())
        wrong += [
            key for key in parameters.keys() & tensors.keys() if parameters[key].shape != tensors[key].shape
        ]
        if wrong:
            raise ValueError(f"{EXPERTS_FILE} and {LAYOUT_FILE} do not belong together ({wrong[0]}, ...)")
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
