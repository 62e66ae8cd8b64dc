"""SPD on trained models (arXiv 2502.20727): where heads and neurons go, what syncs are worth, repair, and its log."""
