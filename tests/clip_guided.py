"""A pipeline with the name and the arguments of diffusers' community class: in every step CLIP
scores the predicted picture, and the gradient of the score, taken back through autoencoder and
U-Net, corrects the prediction."""

import torch
from diffusers import DiffusionPipeline
from torch.nn import functional as F


class CLIPGuidedStableDiffusion(DiffusionPipeline):
    def __init__(
        self, vae, text_encoder, clip_model, tokenizer, unet, scheduler, feature_extractor
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            clip_model=clip_model,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
        )
        text_encoder.requires_grad_(False)
        clip_model.requires_grad_(False)
        self.gradients = []

    def freeze_vae(self):
        self.vae.requires_grad_(False)

    def freeze_unet(self):
        self.unet.requires_grad_(False)

    def seen(self, picture):
        """CLIP's embedding, a unit vector, of a picture [B, 3, Y, X] in -1 … 1."""
        size = self.clip_model.config.vision_config.image_size
        picture = F.interpolate((picture / 2 + 0.5).clamp(0, 1), (size, size), mode="bilinear")
        mean, std = (
            torch.tensor(values, dtype=picture.dtype).view(1, 3, 1, 1)
            for values in (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        )
        pooled = self.clip_model.vision_model((picture - mean) / std).pooler_output
        return F.normalize(self.clip_model.visual_projection(pooled), dim=-1)

    @torch.enable_grad()
    def cond_fn(self, latents, timestep, text, predicted, wanted, clip_guidance_scale):
        """The prediction, moved against the gradient of the distance to `wanted`."""
        latents = latents.detach().requires_grad_()
        scaled = self.scheduler.scale_model_input(latents, timestep)
        noise = self.unet(scaled, timestep, encoder_hidden_states=text).sample
        signal = self.scheduler.alphas_cumprod[timestep].sqrt()
        share = (1 - signal**2).sqrt()
        clean = (latents - share * noise) / signal
        between = clean * share + latents * (1 - share)
        picture = self.vae.decode(between / self.vae.config.scaling_factor).sample
        apart = (self.seen(picture) - wanted).norm(dim=-1).div(2).arcsin().square().mul(2)
        (gradient,) = torch.autograd.grad(apart.mean() * clip_guidance_scale, latents)
        self.gradients.append(gradient)
        return predicted + share * gradient

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=7.5,
        clip_guidance_scale=100,
        generator=None,
        noise=None,
    ):
        ids = self.tokenizer(
            ["", prompt], padding="max_length", max_length=9, truncation=True, return_tensors="pt"
        ).input_ids
        text = self.text_encoder(ids)[0]
        pooled = self.clip_model.text_model(ids[1:]).pooler_output
        wanted = F.normalize(self.clip_model.text_projection(pooled), dim=-1)
        latents = noise.to(text.dtype) * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = self.unet(scaled, t, encoder_hidden_states=text).sample.chunk(2)
            predicted = uncond + guidance_scale * (cond - uncond)
            if clip_guidance_scale > 0:
                predicted = self.cond_fn(
                    latents, t, text[1:], predicted, wanted, clip_guidance_scale
                )
            latents = self.scheduler.step(predicted, t, latents).prev_sample
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample
