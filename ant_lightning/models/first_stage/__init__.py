"""First stages: autoencoders whose latents are denoised."""
