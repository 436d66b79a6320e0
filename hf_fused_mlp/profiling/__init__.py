"""Where a model's time goes, and what fusing its MLPs gains."""
