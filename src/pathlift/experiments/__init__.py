"""The experiments of the paper as commands: train, rescale, prune, rewind, finetune (appendix D). Extra ``experiments``."""
