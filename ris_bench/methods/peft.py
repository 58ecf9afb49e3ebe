"""The tuners of Hugging Face `peft` (github.com/huggingface/peft): each is a published method, which peft cites."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn

from ris_bench.backbones.base import Backbone
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method
from ris_bench.registry import checked

# peft imports transformers, which takes seconds: only where this method is used.
if TYPE_CHECKING:
    from peft import PeftConfig

TARGETS = ("q", "k", "v", "out", "fc1", "fc2", "kernel")

REFUSED = {
    "adalora": "it moves rank between layers by a step of its own in the training loop",
    "adaption_prompt": "it rewrites the attention of LLaMA",
    "ln_tuning": "it is made for LayerNorms, and would train linear and convolution layers in full",
    "poly": "it wants a task with every input",
    "shadow": "it trains a second network beside a language model",
    "trainable_tokens": "it trains rows of an embedding table",
    "xlora": "it mixes adapters that were trained before",
}
"""Tuners that cannot stand at a linear or convolution layer of ours, and why; so do all that tune a prompt."""

ELSEWHERE = (
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
    | {"target_modules", "target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
    | {"fan_in_fan_out", "layer_replication", "megatron_config", "megatron_core", "runtime_config"}
    | {"alora_invocation_tokens", "use_bdlora", "use_qalora", "qalora_group_size", "arrow_config", "corda_config"}
    | {"eva_config", "kasa_config", "loftq_config", "lora_ga_config", "monteclora_config", "velora_config"}
    | {"use_asa", "asa_target_subspaces", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"}
    | {"init_warmup", "final_warmup", "mask_interval"}
)
"""Keys of peft's configurations that other options stand for, or that want a language model, data or their own loop."""

WANT_MORE = ("corda", "eva", "loftq", "lora_ga")
"""Initialisations that want data or quantised weights; without, peft takes the usual one in silence."""


@METHODS("peft")
class Peft(Method):
    """A tuner of peft on linear and convolution layers of both towers, with peft's own configuration.

    `tuner` is peft's name of it: lora (DoRA with `config: {use_dora: true}`), loha, lokr, oft, ia3, vera and others.
    `targets` are kinds of sites; `config` holds keys of peft's configuration class, the others are at peft's defaults.
    Where a key speaks of modules (`feedforward_modules`, `exclude_modules`, `rank_pattern`, `layers_to_transform`), a
    layer is called TOWER.layers.DEPTH.KIND, as text.layers.3.q; a name's end is enough where it is for peft.

    What a tuner freezes and pretrained weights do not give back (VeRA's projections, the rest of a weight that PiSSA
    takes apart) is saved beside the tuned tensors, once where layers share it, and not counted as tunable.

    The default is LoHa of rank 8 (Hyeon-Woo et al., "FedPara", ICLR 2022, arXiv:2108.06098) on query and value. As peft
    initialises it, it is the identity at the start, and so are most tuners; C3A, FourierFT, UniLoRA, VB-LoRA are not.
    """

    identity_at_start = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        tuner: str = "loha",
        targets: tuple[str, ...] = ("q", "v"),
        towers: tuple[str, ...] = ("text", "image"),
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone)
        configuration = self.check(tuner=tuner, targets=targets, towers=towers, config=config)
        sites = {
            f"{'text' if site.tower is backbone.text else 'image'}.layers.{site.depth}.{kind}": site
            for kind in targets
            for site in backbone.sites(kind, towers)
        }
        layers = {name: getattr(site.parent, site.attr) for name, site in sites.items()}
        if tuner == "oft" and any(isinstance(layer, nn.Conv2d) for layer in layers.values()):
            # It sums overlapping patches of what enters (peft tuners/oft/layer.py, `_fold`).
            raise UserError(
                "method 'peft': oft on convolutions, as peft computes it, is neither the identity at the start nor "
                "what it is merged into; take boft"
            )
        before = {id(t): t.detach().clone() for layer in layers.values() for t in _tensors(layer).values()}
        try:
            injected = _injected(layers, configuration)
        except Exception as error:
            raise UserError(f"method 'peft': {tuner} refuses this: {_first_line(error)}") from error
        if not any(p.requires_grad for p in injected.parameters()):
            raise UserError(f"method 'peft': {tuner} tunes nothing at {', '.join(targets)}; choose other targets")
        names = {module: name for name, module in backbone.named_modules()}
        for name, site in sites.items():
            layer = injected.get_submodule(name)
            if layer is layers[name] and not any(p.requires_grad for p in layer.parameters()):
                continue
            site.wrap(lambda _, layer=layer: layer)
            backbone.not_pretrained += tuple(
                f"{names[site.parent]}.{site.attr}.{key}"
                for key, t in _tensors(layer).items()
                if not t.requires_grad and not (id(t) in before and _equal(t, before[id(t)]))
            )

    @staticmethod
    def check(
        *, tuner: str, targets: tuple[str, ...], towers: tuple[str, ...], config: dict[str, Any] | None
    ) -> PeftConfig:
        """The configuration that the options mean. UserError where peft has no such, or it cannot be used here."""
        from peft import PromptLearningConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        for key, values, allowed in (("targets", targets, TARGETS), ("towers", towers, ("text", "image"))):
            if not values or not set(values) <= set(allowed) or len(set(values)) < len(values):
                raise UserError(
                    f"option {key!r} of method 'peft' is {list(values)}; give some of {', '.join(allowed)}, each once"
                )
        kinds = {kind.value.lower(): configuration for kind, configuration in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        prompts = {name: "it tunes a prompt" for name, kind in kinds.items() if issubclass(kind, PromptLearningConfig)}
        refused = REFUSED | prompts
        if tuner not in kinds or tuner in refused:
            why = f", which cannot be used here: {refused[tuner]}" if tuner in refused else ""
            known = ", ".join(sorted(kinds.keys() - refused.keys()))
            raise UserError(f"option 'tuner' of method 'peft' is {tuner!r}{why}; it may be {known}")

        kind, what = kinds[tuner], f"option 'config' of method 'peft' for {tuner}"
        hints = get_type_hints(kind)
        allowed = [field.name for field in fields(kind) if field.init and field.name not in ELSEWHERE]
        values = {}
        for key, value in (config or {}).items():
            if key not in allowed:
                raise UserError(f"{what} has no key {key!r}; its keys are {', '.join(allowed)}")
            if key.startswith("init") and value in WANT_MORE:
                raise UserError(f"{what} has {key} {value!r}, which wants data or quantised weights; choose another")
            values[key] = checked(value, hints[key], f"{what}: {key}")
        if "random_seed" in allowed:
            # Without one, the mask of SHiRA would be another when a result is read back: it is drawn and not saved.
            values.setdefault("random_seed", 0)
        try:
            return kind(target_modules=list(targets), **values)
        except Exception as error:
            raise UserError(f"{what} is refused by peft: {_first_line(error)}") from error

    def merge(self, backbone: Backbone) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for parent in list(backbone.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, BaseTunerLayer):
                    try:
                        layer.merge(safe_merge=True)
                    except Exception as error:
                        raise UserError(f"method 'peft' cannot be merged: {_first_line(error)}") from error
                    setattr(parent, name, layer.get_base_layer())
        super().merge(backbone)


def _injected(layers: dict[str, nn.Module], configuration: PeftConfig) -> nn.Module:
    """A tree of the layers by their names, in which peft has put its own in the place of those that it tunes."""
    from peft import get_peft_model

    if not any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return get_peft_model(_tree(layers), configuration).get_base_model()
    try:
        return get_peft_model(_tree(layers), configuration).get_base_model()
    except (NotImplementedError, RuntimeError):
        # Some tuners look at numbers, of which the meta device has none: where only a count is asked, noise will do.
        with torch.device("cpu"):
            tree = _tree(layers).to_empty(device="cpu")
            for parameter in tree.parameters():
                nn.init.normal_(parameter)
            return get_peft_model(tree, configuration).get_base_model().to("meta")


def _tree(layers: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, layer)
    return root


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return layer.state_dict(keep_vars=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.equal(one, other)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
