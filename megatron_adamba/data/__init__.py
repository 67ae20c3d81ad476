"""Text to training samples: tokenizers, corpora, Megatron's indexed datasets, packing, blending and loading.

Nothing is imported here, so that a preprocessing worker does not pay for torch.
"""
