"""Weights that a run begins with: fitted to its backbone, then laid over the random ones of student and teacher alike."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.names import State
from heliostat.models.stored import ModelInfo
from heliostat.models.weights import fit_pos_embed, load_state, submodule_state
from heliostat.training.config import MethodConfig
from heliostat.training.method import Network


@dataclass(frozen=True)
class StartingWeights:
    """A backbone state without prefix, its architecture, and perhaps `dino_head.*`, `ibot_head.*` and centres.

    `what` names them in errors.
    """

    what: str
    config: BackboneConfig
    backbone: State
    heads: State

    @property
    def has_heads(self) -> bool:
        """Whether there is a DINO head."""
        return any(key.startswith("dino_head.") for key in self.heads)

    def without_heads(self) -> "StartingWeights":
        """The backbone alone."""
        return replace(self, heads={})


# Settings that two backbones must share before weights can move from one to the other.
_SHARED = (
    "embed_dim",
    "depth",
    "num_heads",
    "patch_size",
    "in_chans",
    "num_register_tokens",
    "ffn_layer",
    "mlp_hidden_dim",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
)


def check_fit(what: str, theirs: BackboneConfig, ours: BackboneConfig) -> None:
    """Raise CheckpointError that names the first setting in which a student differs from given weights.

    The native image size may differ: the position embedding is resized.
    """
    for name in _SHARED:
        found, wanted = getattr(theirs, name), getattr(ours, name)
        if found != wanted:
            key = "mlp_ratio" if name == "mlp_hidden_dim" else name
            raise CheckpointError(f"student.{name} is {wanted}, {what} has {found}; set student.{key} to fit the weights")


_HEAD_KEYS = {"out_dim": "head_n_prototypes"}  # every other field is named in the method as in HeadConfig, after "head_"


def check_heads(what: str, teacher: ModelInfo, method: MethodConfig) -> None:
    """Raise CheckpointError that names the first setting in which heads of a distillation differ from those of its teacher."""
    ours: dict[str, tuple[HeadConfig, HeadConfig]] = {"dino": (method.dino.head, teacher.dino_head)}
    if method.ibot.loss_weight > 0:
        is_separate = method.ibot.separate_head
        if is_separate != (teacher.ibot_head is not None):
            has = "has none" if is_separate else "has one"
            raise CheckpointError(
                f"distill.method.ibot.separate_head is {str(is_separate).lower()}, and {what} {has}; "
                f"set distill.method.ibot.separate_head={str(not is_separate).lower()}"
            )
        if teacher.ibot_head is not None:
            ours["ibot"] = (method.ibot.head, teacher.ibot_head)
    for section, (wanted, found) in ours.items():
        for name in HeadConfig.model_fields:
            if getattr(wanted, name) != getattr(found, name):
                key = f"distill.method.{section}.{_HEAD_KEYS.get(name, f'head_{name}')}"
                raise CheckpointError(
                    f"{key} is {getattr(wanted, name)}, {what} has {getattr(found, name)}; set {key}={getattr(found, name)}"
                )


def fit_backbone(start: StartingWeights, config: BackboneConfig) -> StartingWeights:
    """The weights with the position embedding resized to the config's native grid. Raises as `check_fit`."""
    check_fit(start.what, start.config, config)
    return replace(start, config=config, backbone=fit_pos_embed(start.backbone, config))


def start_network(network: Network, start: StartingWeights) -> None:
    """Lay starting weights over a network; heads only where the weights bring them. Raises CheckpointError on any misfit."""
    load_state(network.backbone, start.backbone, start.what)
    if start.has_heads:
        for name, head in _heads(network).items():
            load_state(head, submodule_state(start.heads, name), f"{name} of {start.what} (init.heads=fresh draws a new one)")


def start_targets(targets: Mapping[str, nn.Module], start: StartingWeights) -> None:
    """Take the centres that the weights bring, where the method keeps centres too."""
    for name, module in targets.items():
        centre = submodule_state(start.heads, name)
        if centre and module.state_dict():
            load_state(module, centre, f"{name} of {start.what}")


def _heads(network: Network) -> dict[str, nn.Module]:
    heads: dict[str, nn.Module] = {"dino_head": network.dino_head}
    return heads | ({"ibot_head": network.ibot_head} if network.ibot_head is not None else {})
