"""Every task peftune trains. A further one is one file and one line here."""

from collections.abc import Mapping
from types import MappingProxyType

from peftune.tasks.causal_lm import CAUSAL_LM
from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
from peftune.tasks.task import Task

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (SEQUENCE_CLASSIFICATION, CAUSAL_LM)})
