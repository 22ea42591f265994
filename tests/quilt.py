"""A small transformer and its pipeline, outside of fastdiff, as a user who adds a network has them.
docs/add-a-network.md shows how to add them; test_add_a_network.py follows that page."""

from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F


class QuiltBlock(nn.Module):
    """Patches attend to one another and to a text, between norms that the timestep modulates."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.text_k = nn.Linear(text_width, width)
        self.text_v = nn.Linear(text_width, width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor, embedded: Tensor) -> Tensor:
        vectors = self.modulation(embedded)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        h = self.norm1(x) * (1 + scale) + shift
        q = self.split_heads(self.to_q(h))
        k = self.split_heads(torch.cat([self.to_k(h), self.text_k(text)], dim=1))
        v = self.split_heads(torch.cat([self.to_v(h), self.text_v(text)], dim=1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.to_out(seen)
        h = self.norm2(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.down(F.gelu(self.up(h), approximate="tanh"))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QuiltTransformer2DModel(ModelMixin, ConfigMixin):
    """Latents [B, C, Y, X], timesteps [B] and a text [B, T, D'] -> the prediction [B, C, Y, X]."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 2,
        num_attention_heads: int = 2,
        attention_head_dim: int = 32,
        cross_attention_dim: int = 64,
        pos_embed_max_size: int = 16,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=width,
            pos_embed_max_size=pos_embed_max_size,
        )
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.blocks = nn.ModuleList(
            QuiltBlock(width, num_attention_heads, cross_attention_dim) for _ in range(num_layers)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> Any:
        size = self.config.patch_size
        rows, columns = (side // size for side in hidden_states.shape[2:])
        x = self.pos_embed(hidden_states)
        embedded = F.silu(self.time_embedding(self.time_proj(timestep).to(x.dtype)))
        for block in self.blocks:
            x = block(x, encoder_hidden_states, embedded)
        shift, scale = self.modulation(embedded)[:, None].chunk(2, dim=-1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        batch, channels = hidden_states.shape[:2]
        x = x.reshape(batch, rows, columns, size, size, channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        x = x.reshape(batch, channels, rows * size, columns * size)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class QuiltPipeline(DiffusionPipeline):
    """Text to image, written like diffusers' own pipelines."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        transformer: QuiltTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        """[B, T, D']"""
        length = self.tokenizer.model_max_length
        read = self.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(read.input_ids.to(self._execution_device))[0]

    def prepare_latents(
        self, shape: tuple[int, ...], dtype: torch.dtype, generator: Any, latents: Tensor | None
    ) -> Tensor:
        if latents is not None:
            return latents.to(self._execution_device, dtype)
        return randn_tensor(shape, generator, self._execution_device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> StableDiffusionPipelineOutput:
        self._guidance_scale, self._interrupt = guidance_scale, False
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        prompt = [prompt] if isinstance(prompt, str) else prompt
        prompt_embeds = self.encode_prompt(prompt)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([self.encode_prompt([""] * len(prompt)), prompt_embeds])

        side, factor = self.transformer.config.sample_size, self.vae_scale_factor
        sides = (height or side * factor) // factor, (width or side * factor) // factor
        shape = (len(prompt), self.transformer.config.in_channels, *sides)
        latents = self.prepare_latents(shape, prompt_embeds.dtype, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                both = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                noise_pred = self.transformer(
                    both, t.expand(both.shape[0]), prompt_embeds, return_dict=False
                )[0]
                if self.do_classifier_free_guidance:
                    uncond, text = noise_pred.chunk(2)
                    noise_pred = uncond + self.guidance_scale * (text - uncond)
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    here = locals()
                    seen = {name: here[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, seen)
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                if i == len(timesteps) - 1 or (
                    (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        if output_type == "latent":
            return StableDiffusionPipelineOutput(latents, None)
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, None)
