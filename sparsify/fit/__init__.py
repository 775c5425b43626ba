"""How numbers enter a model: calibrate (closed form), schedule (search), finetune (gradient)."""
