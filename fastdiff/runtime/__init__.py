"""The denoising loop: schedulers as tables, what does not change hoisted, the loop itself."""
