"""The plans of pipelines with a prior: UnCLIP, Kandinsky 2.2 and Stable UnCLIP."""

from collections.abc import Mapping
from dataclasses import replace

from fastdiff.plans import Plan

_GUIDED = "do_classifier_free_guidance"


def _settings(scale: str, guided: str = _GUIDED) -> Mapping[str, str]:
    return {"guidance_scale": scale, _GUIDED: guided}


def _prior(embedding: str, text: str, mask: str) -> Plan:
    """The plan of a prior's loop, from the names of its conditions."""
    conditions = {
        "proj_embedding": embedding,
        "encoder_hidden_states": text,
        "attention_mask": mask,
    }
    return Plan(
        conditions=conditions,
        required=tuple(conditions.values()),
        returned=(),
        network="prior",
        entrance="progress_bar",
        iterates=True,
        timesteps="timesteps",
        scaled="",
    )


KANDINSKY = replace(
    _prior("prompt_embeds", "text_encoder_hidden_states", "text_mask"),
    step_arguments=("generator",),
    prev_timestep=True,
)
KANDINSKY_EMB2EMB = replace(KANDINSKY, settings=_settings("guidance_scale"))
_UNCLIP_PRIOR = replace(
    _prior("prompt_embeds", "text_enc_hid_states", "text_mask"),
    scheduler="prior_scheduler",
    settings=_settings("prior_guidance_scale"),
    step_arguments=("generator",),
    prev_timestep=True,
    latents="prior_latents",
    timesteps="prior_timesteps_tensor",
)


def _decoder(text: str) -> Plan:
    """The plan of the loop of UnCLIP's decoder; `text`: the variable of the text."""
    conditions = {
        "encoder_hidden_states": text,
        "class_labels": "additive_clip_time_embeddings",
        "encoder_attention_mask": "decoder_text_mask",
    }
    return Plan(
        conditions=conditions,
        required=tuple(conditions.values()),
        returned=(),
        network="decoder",
        scheduler="decoder_scheduler",
        settings=_settings("decoder_guidance_scale"),
        step_arguments=("generator",),
        prev_timestep=True,
        variance="kept",
        latents="decoder_latents",
        entrance="progress_bar",
        iterates=True,
        timesteps="decoder_timesteps_tensor",
        scaled="",
    )


_SUPER_RES = Plan(
    conditions={},
    required=(),
    returned=(),
    network="super_res_first",
    last="super_res_last",
    scheduler="super_res_scheduler",
    step_arguments=("generator",),
    prev_timestep=True,
    latents="super_res_latents",
    entrance="progress_bar",
    iterates=True,
    timesteps="super_res_timesteps_tensor",
    constant_channels=("image_upscaled",),
    scaled="",
)
_STABLE_PRIOR = replace(
    _prior("prior_prompt_embeds", "prior_text_encoder_hidden_states", "prior_text_mask"),
    scheduler="prior_scheduler",
    settings=_settings("prior_guidance_scale", "prior_do_classifier_free_guidance"),
    step_options="prior_extra_step_kwargs",
    latents="prior_latents",
    timesteps="prior_timesteps_tensor",
    scaled="latents",
)
STABLE_PICTURE = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds", "class_labels": "image_embeds"},
    required=("prompt_embeds", "image_embeds"),
    returned=(),
    network="unet",
    settings=_settings("guidance_scale"),
    step_options="extra_step_kwargs",
    entrance="progress_bar",
    iterates=True,
    timesteps="timesteps",
    absent=("cross_attention_kwargs",),
)
UNCLIP = (_UNCLIP_PRIOR, _decoder("text_enc_hid_states"), _SUPER_RES)
VARIATION = (_decoder("text_encoder_hidden_states"), _SUPER_RES)
STABLE = (_STABLE_PRIOR, STABLE_PICTURE)
