"""SPD on trained models (arXiv 2502.20727): where heads and neurons go, sensitivity, distillation, and its log."""
