"""Maps that any GTFormer-shaped classifier gives without learning them: what users gain over these is the point.

Sources: CAM, Zhou et al. (CVPR 2016); Grad-CAM, Selvaraju et al. (ICCV 2017); attention rollout, Abnar and Zuidema (ACL
2020). All are scaled to minimum 0 and maximum 1 in every photo.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.gtformer import GRID, Block, GTFormer

__all__ = ["BASELINES", "AttentionRollout", "Baseline", "ClassActivation", "GradCam"]


class Baseline(nn.Module):
    """Images (B, 3, 224, 224) and, optionally, the classes (B,) to look for instead of the likeliest ones -> "logits"
    (B, C) and "map" (B, 14, 14) in [0, 1]."""

    def __init__(self, net: GTFormer) -> None:
        super().__init__()
        self.net, self.num_classes = net, net.config.num_classes

    def forward(self, x: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
        logits, scores = self.scores(x, classes)
        low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
        return {"logits": logits, "map": (scores - low) / (high - low).clamp(min=1e-12)}


class ClassActivation(Baseline):
    """The class's map, rectified: its mean is the logit."""

    def scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = self.net(x, class_maps=True)
        chosen = out["logits"].argmax(1) if classes is None else classes
        return out["logits"], out["class_maps"][torch.arange(len(x), device=x.device), chosen].relu()


class GradCam(Baseline):
    """Patch tokens before the last block, weighted by the mean gradient of the class's logit."""

    def scores(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []

        def watch(block: Block, inputs: tuple) -> tuple:
            tokens.append(inputs[0].detach().requires_grad_())
            return (tokens[-1], *inputs[1:])

        # inference mode, if it is on, would forbid the gradient
        with torch.inference_mode(False), torch.enable_grad():
            handle = self.net.blocks[-1].register_forward_pre_hook(watch)
            try:
                logits = self.net(x.clone())["logits"]
            finally:
                handle.remove()
            chosen = logits.argmax(1) if classes is None else classes.clone()
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), tokens[0])
        patches = slice(1, -self.net.config.num_query_tokens)
        weight = gradient[:, patches].mean(1, keepdim=True)
        scores = (tokens[0].detach()[:, patches] * weight).sum(-1).relu()
        return logits.detach(), scores.unflatten(1, (GRID, GRID))


class AttentionRollout(Baseline):
    """Attention, averaged over heads, with the identity for the residual, multiplied through all blocks: how much each
    patch of the input reaches the mean of the patches at the end, whatever the class."""

    def scores(self, x: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] = []
        handles = [
            block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in self.net.blocks
        ]
        try:
            logits = self.net(x)["logits"]
        finally:
            for handle in handles:
                handle.remove()
        patches = slice(1, -self.net.config.num_query_tokens)
        count = inputs[0].shape[1]
        reach = torch.zeros(len(x), 1, count, device=x.device)
        reach[:, :, patches] = 1 / (GRID * GRID)
        for block, tokens in zip(reversed(self.net.blocks), reversed(inputs)):
            reach = (reach + reach @ _attention(block, tokens)) / 2
        return logits, reach[:, 0, patches].unflatten(1, (GRID, GRID))


def _attention(block: Block, x: Tensor) -> Tensor:
    # normalised tokens (B, N, D) -> mean over heads of the attention matrix (B, N, N)
    q, k, _ = (
        part.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2).float()
        for part in block.attn.qkv(x).chunk(3, -1)
    )
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


BASELINES = {"cam": ClassActivation, "gradcam": GradCam, "rollout": AttentionRollout}
