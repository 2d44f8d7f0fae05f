"""Hugging Face folders in and out: safetensors files, tensor names, configs, and the command that converts."""
