"""The plain path, which all speeds are compared with: what openai/improved-diffusion computes on a CPU.

Mathematics, parameters and gradients are those of the fast path. Nothing is fused, rearranged, spread
over threads of our own or rounded to 16 bits.
"""

from collections.abc import Collection

import torch as th
from torch import nn

from improved_diffusion.cpu.machine import keep_memory
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.nn import Conv2d, PointwiseConv1d, PointwiseConv2d
from improved_diffusion.unet import Projected, QKVAttention, ResBlock, UNetModel

# Thresholds of malloc with which plain training takes as long as with those of the GNU C library. The library adapts
# its own to the program, and once they are set they cannot be restored.
USUAL_THRESHOLDS = (16 * 2**20, 13 * 2**20)


class PlainResBlock(ResBlock):
    """Normalisation, scale and shift as operations of their own."""

    def _evaluate(self, x: th.Tensor, projected: th.Tensor) -> th.Tensor:
        h = self.in_layers(x)
        emb = projected[..., None, None]
        norm, *others = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        for layer in others:
            h = layer(h)
        return self.skip_connection(x) + h


class PlainAttention(QKVAttention):
    """Queries and keys scaled separately; attention weights in float32, with the keys in the last dimension."""

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        n, channels, length = qkv.shape
        width = channels // (3 * self.num_heads)
        q, k, v = qkv.reshape(n * self.num_heads, 3 * width, length).split(width, dim=1)
        scale = width**-0.25
        scores = th.einsum("ncq,nck->nqk", scale * q, scale * k)
        weights = scores.float().softmax(dim=-1).to(v.dtype)
        return th.einsum("nqk,nck->ncq", weights, v).reshape(n, -1, length)

    def attend(self, qkv: th.Tensor) -> th.Tensor:
        return self(qkv.transpose(1, 2)).transpose(1, 2)


class PlainUNet(UNetModel):
    """The timestep embedding projected block by block, and PyTorch's default memory layout."""

    def _project(self, emb: th.Tensor) -> Projected:
        return {block: block.emb_layers(emb) for block in self._res_blocks}


PLAIN = {
    UNetModel: PlainUNet,
    ResBlock: PlainResBlock,
    QKVAttention: PlainAttention,
    Conv2d: nn.Conv2d,
    PointwiseConv1d: nn.Conv1d,
    PointwiseConv2d: nn.Conv2d,
}


class LayeredResBlock(ResBlock):
    """The fast operations, one for each layer."""

    def _fusible(self) -> None:
        return None


class LayeredAttention(QKVAttention):
    """The fast operations, one for each layer: blocks are computed as a whole only with the class itself."""


LAYERED = {ResBlock: LayeredResBlock, QKVAttention: LayeredAttention}


def layer_by_layer(model: nn.Module) -> nn.Module:
    """Let `model` compute its blocks by one operation for each layer, not for each block. :return: `model`."""
    for module in model.modules():
        module.__class__ = LAYERED.get(type(module), type(module))
    return model


def make_plain(model: nn.Module, kinds: Collection[type[nn.Module]] = tuple(PLAIN)) -> nn.Module:
    """Switch the modules of these `kinds` in `model` to plain operations. :return: `model`."""
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = PLAIN[type(module)]
        if isinstance(module, PlainUNet):
            module.channels_last = False
            module.to(memory_format=th.contiguous_format)
    return model


def usual_memory() -> None:
    """Undo `keep_memory`: return freed memory to the system, as programs usually do."""
    keep_memory(*USUAL_THRESHOLDS)


class PlainTraining:
    """Training steps in float32, with PyTorch's threads: microbatches in turn, tensors updated one by one."""

    def __init__(self, model: nn.Module, diffusion: GaussianDiffusion, microbatch: int):
        self.model = make_plain(model).train()
        self.diffusion = diffusion
        self.microbatch = microbatch
        self.params = list(model.parameters())
        self.optimizer = th.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
        self.average = [p.detach().clone() for p in self.params]

    def step(self, batch: th.Tensor) -> None:
        """Update weights and moving average by a `batch` of images [B, C, H, W]."""
        self.optimizer.zero_grad()
        timesteps = th.randint(self.diffusion.num_timesteps, (len(batch),))
        self.add_gradients(batch, timesteps, th.randn_like(batch))
        self.gradient_norm = sum((p.grad**2).sum().item() for p in self.params) ** 0.5
        self.optimizer.step()
        with th.no_grad():
            for average, p in zip(self.average, self.params):
                average.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    def add_gradients(self, batch: th.Tensor, timesteps: th.Tensor, noise: th.Tensor) -> None:
        """Add the gradient of the mean loss to that of the parameters."""
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            terms = self.diffusion.training_losses(
                self.model, batch[part], timesteps[part], noise=noise[part]
            )
            (terms["loss"].sum() / len(batch)).backward()
