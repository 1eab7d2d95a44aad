"""Images per CPU second of a DINOv2 training step, beside a straightforward implementation of the same method.

    make bench

The plain side has the same weights, kernels and optimizer, but one forward per crop size, drop path that computes all residuals
and multiplies them by a mask, one head call per kind of token and one cross-entropy per pair of crops. Before anything is timed
both sides must give the same losses and gradients at drop rate 0. Steps of both sides alternate in one run.
"""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from results_file import cpu_hardware, today, versions, write_result
from torch import Tensor, nn
from torch.nn import functional
from training_step import OPTIM, VALUES, Setting, TrainingStep, build_model, normalise, random_batch

from heliostat.data.batch import Batch
from heliostat.models.blocks import Block
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer, resize_pos_embed
from heliostat.training.config import DinoConfig, MethodConfig
from heliostat.training.method import SelfDistillation
from heliostat.training.param_groups import apply_step_values, build_optimizer

# Shapes: B images of one size, T tokens of an image, D width, C global crops, N patches of one, M masked patches, K prototypes.

DROP_RATES = (0.0, 0.2, 0.4)
PAIRS = 9
WARM_UP = 1
CPU = torch.device("cpu")


def setting(drop_path_rate: float, num_images: int = 8) -> Setting:
    """ViT-Ti/14 on crops of 112 and 56 pixels: 2 x 69 and 8 x 21 tokens an image, a step of about two seconds."""
    return Setting(
        BackboneConfig(arch="vit_tiny", img_size=112, layerscale=0.1),  # 0.1, so that the gate sees gradients of the blocks
        MethodConfig(
            drop_path_rate=drop_path_rate,
            centering="sinkhorn_knopp",
            dino=DinoConfig(head_n_prototypes=8192, head_hidden_dim=1024),
        ),
        global_size_pixels=112,
        local_size_pixels=56,
        num_images=num_images,
    )


# The plain side: functions over the product's parameters.


def plain_drop_path(branch_BTD: Tensor, rate: float) -> Tensor:
    """Multiply whole images by 0, or by what keeps the expectation."""
    if rate == 0:
        return branch_BTD
    kept_B11 = branch_BTD.new_empty(branch_BTD.shape[0], 1, 1).bernoulli_(1 - rate)
    return branch_BTD * kept_B11 / (1 - rate)


def plain_block(block: Block, x_BTD: Tensor, rate: float) -> Tensor:
    """A transformer block on images of one size."""
    B, T, D = x_BTD.shape
    qkv = block.attn.qkv(block.norm1(x_BTD)).reshape(B, T, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(B, T, D)
    x_BTD = x_BTD + plain_drop_path(block.attn.proj(mixed) * block.ls1.gamma, rate)
    hidden = functional.gelu(block.mlp.fc1(block.norm2(x_BTD)))
    return x_BTD + plain_drop_path(block.mlp.fc2(hidden) * block.ls2.gamma, rate)


def plain_backbone(vit: VisionTransformer, images: Tensor, masks: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
    """cls tokens and patch tokens of images of one size."""
    side = images.shape[-1] // vit.patch_size
    x_BND = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if masks is not None:
        x_BND = torch.where(masks[:, :, None], vit.mask_token, x_BND)
    x_BTD = torch.cat([vit.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1)
    x_BTD = x_BTD + resize_pos_embed(vit.pos_embed, (side, side), antialias=True, offset=0.0)
    registers = vit.register_tokens.expand(len(x_BND), -1, -1)
    x_BTD = torch.cat([x_BTD[:, :1], registers, x_BTD[:, 1:]], dim=1)
    for block in vit.blocks:
        x_BTD = plain_block(block, x_BTD, rate)
    x_BTD = vit.norm(x_BTD)
    return x_BTD[:, 0], x_BTD[:, 1 + registers.shape[1] :]


@torch.no_grad()
def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Three Sinkhorn-Knopp iterations on probabilities."""
    table_KR = torch.exp(logits / temperature).T
    num_prototypes, num_rows = table_KR.shape
    table_KR /= table_KR.sum()
    for _ in range(3):
        table_KR /= table_KR.sum(1, keepdim=True) * num_prototypes
        table_KR /= table_KR.sum(0, keepdim=True) * num_rows
    return (table_KR * num_rows).T


def plain_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row."""
    return -(targets * functional.log_softmax(logits / temperature, dim=-1)).sum(-1)


def plain_koleo(cls_BD: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour."""
    unit_BD = functional.normalize(cls_BD, dim=-1, eps=1e-8)
    nearest = (unit_BD @ unit_BD.T).detach().fill_diagonal_(-1).argmax(1)
    return -(functional.pairwise_distance(unit_BD, unit_BD[nearest], eps=1e-8) + 1e-8).log().mean()


def plain_losses(model: SelfDistillation, batch: Batch, teacher_temp: float) -> dict[str, Tensor]:
    """The losses of a batch, by the names of the product."""
    rate, temp, masks_CN = model.method.drop_path_rate, model.method.student_temp, batch.masks
    with torch.no_grad():
        cls, patches = plain_backbone(model.teacher.backbone, batch.global_crops, None, 0.0)
        targets = plain_sinkhorn(model.teacher.dino_head(cls), teacher_temp).chunk(2)
        patch_targets = plain_sinkhorn(model.teacher.dino_head(patches[masks_CN]), teacher_temp)
    head = model.student.dino_head
    global_cls, patches = plain_backbone(model.student.backbone, batch.global_crops, masks_CN, rate)
    local_cls, _ = plain_backbone(model.student.backbone, batch.local_crops, None, rate)
    globals_, num_local = head(global_cls).chunk(2), len(local_cls) * 2 // len(global_cls)
    locals_ = head(local_cls).chunk(num_local)
    num_pairs = 2 + 2 * num_local
    pairs = [(0, 1), (1, 0)]
    weights = (1 / masks_CN.sum(1).clamp(min=1))[:, None].expand_as(masks_CN)[masks_CN]
    return {
        "dino_global": sum(plain_cross_entropy(globals_[s], targets[t], temp).mean() for t, s in pairs) / num_pairs,
        "dino_local": sum(plain_cross_entropy(s, t, temp).mean() for t in targets for s in locals_) / num_pairs,
        "ibot": (plain_cross_entropy(head(patches[masks_CN]), patch_targets, temp) * weights).sum() / len(masks_CN),
        "koleo": sum(plain_koleo(cls) for cls in global_cls.chunk(2)),
    }


class PlainStep:
    """The plain step: losses, backward, clip per sub-module, AdamW, moving average parameter by parameter."""

    def __init__(self, model: SelfDistillation) -> None:
        self.model = model
        self._optimizer = build_optimizer(model.networks, OPTIM)
        apply_step_values(self._optimizer.param_groups, VALUES)

    def __call__(self, batch: Batch) -> None:
        losses = plain_losses(self.model, normalise(batch), VALUES.teacher_temp)
        self.model.weighted_sum(losses).backward()
        for module in self.model.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(self.model.teacher.parameters(), self.model.student.parameters(), strict=True):
                average.mul_(VALUES.momentum).add_(parameter, alpha=1 - VALUES.momentum)


# The measurement.


def disagreement(model: SelfDistillation, batch: Batch) -> tuple[float, float]:
    """Largest relative difference of both sides: of a loss, and of the gradient of a parameter (by its norm)."""
    results = []
    for losses_of in (model, lambda *inputs: plain_losses(model, *inputs)):
        model.zero_grad(set_to_none=True)
        losses = losses_of(normalise(batch), VALUES.teacher_temp)
        model.weighted_sum(losses).backward()
        gradients = {name: parameter.grad for name, parameter in model.student.named_parameters()}
        results.append((losses, gradients))
    model.zero_grad(set_to_none=True)
    (ours, our_gradients), (theirs, their_gradients) = results
    loss = max(abs(ours[name].item() / theirs[name].item() - 1) for name in theirs)
    gradient = max(((our_gradients[name] - their).norm() / their.norm()).item() for name, their in their_gradients.items())
    return loss, gradient


def check_agreement(num_images: int = 4) -> tuple[float, float]:
    """The gate: RuntimeError unless both sides agree at drop rate 0."""
    case = setting(0.0, num_images)
    loss, gradient = disagreement(build_model(case), random_batch(case, CPU))
    if loss > 1e-5 or gradient > 1e-4:
        raise RuntimeError(f"both sides differ by {loss:.1e} (losses) and {gradient:.1e} (gradients); nothing was timed")
    return loss, gradient


@dataclass(frozen=True)
class Row:
    """Images per CPU second of both sides at one drop rate, pair by pair."""

    case: Setting
    ours: list[float]
    plain: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over plain, of steps that ran next to each other."""
        return [ours / plain for ours, plain in zip(self.ours, self.plain, strict=True)]


def measure(case: Setting) -> Row:
    """Alternate steps of both sides from the same weights; which side goes first alternates too."""
    model = build_model(case)
    steps = {"plain": PlainStep(copy.deepcopy(model)), "ours": TrainingStep(model, CPU, torch.float32)}
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(WARM_UP + PAIRS):
        batch = random_batch(case, CPU, seed=number)
        for name in sorted(steps, reverse=number % 2 == 1):
            started = time.process_time()
            steps[name](batch)
            if number >= WARM_UP:
                rates[name].append(case.num_images / (time.process_time() - started))
    return Row(case, rates["ours"], rates["plain"])


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(rows: list[Row], agreement: tuple[float, float]) -> list[str]:
    """The result file."""
    case, first = rows[0].case, rows[0]
    lines = [
        f"# Training step on a CPU, {today()}",
        "",
        f"{versions()}. Command: `make bench`. Medians of {PAIRS} interleaved pairs of steps, spread in brackets.",
        "",
        f"ViT-Ti/14, {case.num_images} images, 2 x {case.global_size_pixels} and {case.num_local_crops} x "
        f"{case.local_size_pixels} pixels, K = {case.method.dino.head_n_prototypes}, float32, random pixels. The gate: at drop "
        f"rate 0 losses differ by at most {agreement[0]:.0e}, gradients by {agreement[1]:.0e} (relative).",
        "",
        "Small machine, small model, shared host: ratios hold better than rates, and nothing here speaks for a GPU.",
        "",
        "Model FLOPs leave out what stochastic depth drops. Relative: to drop rate 0.",
        "",
        "| drop rate | images per CPU s | plain implementation | ratio | TFLOP per image | relative | CPU time, relative |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counted = row.case.tflop_per_image()
        measured = statistics.median(first.ours) / statistics.median(row.ours)
        lines.append(
            f"| {row.case.method.drop_path_rate} | {spread(row.ours)} | {spread(row.plain)} | {spread(row.ratios)} "
            f"| {counted:.4f} | {counted / case.tflop_per_image():.2f} | {measured:.2f} |"
        )
    return lines


def main() -> None:
    """Gate, measure, write."""
    torch.set_num_threads(1)
    agreement = check_agreement()
    write_result("step_cpu", table([measure(setting(rate)) for rate in DROP_RATES], agreement), cpu_hardware())


if __name__ == "__main__":
    main()
