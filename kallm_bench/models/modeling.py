"""What AutoModelForCausalLM loads: a class for each base architecture that builds itself with its retrofits in place.

A retrofitted Llama stays a Llama: same attributes, same parameter names outside the replaced modules, same generate. So
its class is a subclass made on the fly, and nothing has to be forwarded by hand. Only config.json differs: its
`model_type` is "kallm", it holds the base model's configuration and the specs, and it names the modelling file to use
where kallm_bench is not installed, see standalone.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kallm_bench.errors import CheckpointError
from kallm_bench.models.replacement import install
from kallm_bench.models.spec import KANSpec
from kallm_bench.models.standalone import modeling_file

MODELING_FILE = "modeling_kallm.py"
"""In the folder of a checkpoint: these classes, for an environment without kallm_bench."""

AUTO_MAP = {"AutoConfig": "modeling_kallm.KallmConfig", "AutoModelForCausalLM": "modeling_kallm.KallmForCausalLM"}
"""What transformers looks for in it, where it is trusted and these classes are not registered."""


class KallmConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """config.json of a retrofitted model.

    Args:
        base_config: the base model's whole configuration, `model_type` included.
        retrofits: KANSpec.to_json() of each retrofit, in order.
    """

    model_type = "kallm"
    base_config: dict[str, Any] | None = None
    retrofits: list[dict[str, Any]] | None = None

    def to_base(self) -> PreTrainedConfig:
        """The base model's configuration, with the retrofits noted in its attribute `kallm`."""
        fields = dict(self.base_config or {})
        kind = fields.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise CheckpointError(f"its base model is of the type '{kind}', which this version of transformers lacks")
        config = CONFIG_MAPPING[kind].from_dict(fields)
        config.kallm = list(self.retrofits or [])
        return config

    @classmethod
    def of(cls, config: PreTrainedConfig) -> KallmConfig:
        """The config.json of a model whose own configuration notes retrofits."""
        base = config.to_dict()
        retrofits = base.pop("kallm")
        for name in ("architectures", "_name_or_path", "_model_name_or_path"):  # of a class and a path that were
            base.pop(name, None)
        return cls(
            base_config=base,
            retrofits=retrofits,
            architectures=["KallmForCausalLM"],
            dtype=base.get("dtype"),
        )


class KallmForCausalLM:
    """The door: `from_pretrained` builds the right class for the base architecture. Never itself an instance."""

    config_class = KallmConfig

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: Any, config: KallmConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """The model, and with `output_loading_info` transformers' report on its weights, as of any model class.

        Raises:
            CheckpointError: weights that are missing, by name, where no report was asked for.
        """
        base = (config or KallmConfig.from_pretrained(folder)).to_base()
        if config is not None and getattr(config, "_attn_implementation", None):
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        told = kwargs.pop("output_loading_info", False)
        model, report = _class_for(base).from_pretrained(folder, *args, config=base, output_loading_info=True, **kwargs)
        if told:
            return model, report
        if report["missing_keys"]:  # transformers would leave in them what the memory held
            raise CheckpointError(f"{folder}: its weights lack {sorted(report['missing_keys'])[:3]}")
        return model

    @classmethod
    def _from_config(cls, config: KallmConfig, **kwargs: Any) -> PreTrainedModel:
        base = config.to_base()
        return _class_for(base)._from_config(base, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked of what comes from a modelling file, so that saving copies that file. Saving does so anyway."""


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens one document may have; None where a model's configuration does not say."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def specs_of(config: PreTrainedConfig) -> list[KANSpec]:
    """The retrofits noted in a base model's configuration; empty for an untouched one."""
    return [KANSpec.from_json(spec) for spec in getattr(config, "kallm", None) or []]


def retrofitted_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model class that installs the retrofits its configuration notes, and says so when saved."""
    if hasattr(base, "kallm_base"):
        return base
    if base not in _RETROFITTED:
        _RETROFITTED[base] = _make_class(base)
    return _RETROFITTED[base]


_RETROFITTED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def _make_class(base: Any) -> type[PreTrainedModel]:
    class Retrofitted(base):  # type: ignore[misc]
        kallm_base = base

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            install(self, specs_of(config))

        @classmethod
        def is_custom_code(cls) -> bool:
            """transformers renames weights and fills buffers for its own architectures alone; this is one of them."""
            return bool(base.is_custom_code())

        def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, **kwargs)
            folder, config, code = (
                Path(save_directory),
                KallmConfig.of(self.config),
                modeling_file(specs_of(self.config)),
            )
            if code is not None:
                config.auto_map = AUTO_MAP
                (folder / MODELING_FILE).write_text(code, encoding="utf-8")
            written = _without_defaults(config.to_json_string(use_diff=False))
            (folder / "config.json").write_text(written, encoding="utf-8")

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return bool(base._can_set_attn_implementation())  # transformers looks for it in the source beside a class

        @classmethod
        def _can_set_experts_implementation(cls) -> bool:
            return bool(base._can_set_experts_implementation())

    # by a class's name transformers tells which cache it generates with, which weights it renames, who has a pipeline
    Retrofitted.__name__ = Retrofitted.__qualname__ = base.__name__
    return Retrofitted


def skeleton_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A base model's configuration as a model without values, the retrofits that it notes in place, for evaluation."""
    with torch.device("meta"):
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if getattr(config, "kallm", None):
            architecture = retrofitted_class(architecture)
        model: PreTrainedModel = architecture._from_config(config, dtype=dtype).eval()
        return model


def original_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of the untouched model."""
    base: type[PreTrainedModel] = getattr(type(model), "kallm_base", type(model))
    return base


def register() -> None:
    """Teaches the Auto classes about `model_type: "kallm"`; safe to call again."""
    AutoConfig.register(KallmConfig.model_type, KallmConfig, exist_ok=True)
    AutoModelForCausalLM.register(KallmConfig, KallmForCausalLM, exist_ok=True)


def _class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return retrofitted_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _without_defaults(text: str) -> str:
    keep = (
        "model_type",
        "architectures",
        "auto_map",
        "dtype",
        "base_config",
        "retrofits",
        "transformers_version",
    )
    data = json.loads(text)
    return json.dumps({key: data[key] for key in keep if key in data}, indent=2) + "\n"
