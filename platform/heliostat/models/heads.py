"""The projection head that turns tokens into logits over prototypes."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from heliostat.models.config import HeadConfig

# Shapes: R rows (tokens of any kind), D width of the backbone, b bottleneck width, K prototypes.


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, then weight-normalised prototypes: the head of DINO, used unchanged for iBOT.

    Keys are `mlp.*` and `last_layer.*`; the gain of each prototype starts at 1 and is trained, as in DINOv2. Call it once per
    step with all rows: every call rebuilds the K x b prototype matrix from gain and direction.
    """

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        widths = [in_dim, *[config.hidden_dim] * (config.nlayers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(config.nlayers):
            layers += [nn.Linear(widths[index], widths[index + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = weight_norm(nn.Linear(config.bottleneck_dim, config.out_dim, bias=False))
        initialise_head(self)

    def forward(self, tokens_RD: Tensor) -> Tensor:
        """(R, D) -> logits (R, K); R may be 0."""
        bottleneck_Rb = self.mlp(tokens_RD)
        eps = 1e-6 if bottleneck_Rb.dtype == torch.float16 else 1e-12  # 1e-12 is 0 in half precision
        return self.last_layer(functional.normalize(bottleneck_Rb, dim=-1, eps=eps))  # type: ignore[no-any-return]


def initialise_head(head: ProjectionHead) -> None:
    """DINOv2's initialisation: MLP truncated normal 0.02 and bias 0, prototype gains 1, directions PyTorch's default."""
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        # The parametrization stores gain (K, 1) and direction (K, b) as original0 and original1.
        head.last_layer.parametrizations.weight.original0.fill_(1)
