"""The denoising loop: schedulers as tables, values computed once per picture, recorded steps."""
