"""Fine-tuning by recipe: stages of losses, from a laptop to many GPUs (`docs/training.md`).

plan       what a run will do, with every check, before anything is computed
loop       stages, steps, validations, saved states
lesson     one pass of student and teacher -> losses
folder     what a run leaves on disk, and how a killed one goes on
"""

from sparsify.finetune.folder import RunFolder
from sparsify.finetune.plan import Plan, Source, check, plan
from sparsify.finetune.run import finetune
from sparsify.finetune.standing import How, Outcome

__all__ = ["How", "Outcome", "Plan", "RunFolder", "Source", "check", "finetune", "plan"]
