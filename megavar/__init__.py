"""Variational training of reasoning language models on Megatron-Core."""
