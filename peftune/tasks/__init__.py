"""Every task peftune trains. A further one is one file and one line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from peftune.config.schema import EvaluationConfig, TrainConfig
from peftune.tasks.causal_lm import CAUSAL_LM
from peftune.tasks.preference import preference
from peftune.tasks.question_answering import question_answering
from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
from peftune.tasks.task import Task
from peftune.tasks.token_classification import TOKEN_CLASSIFICATION

TASKS: Mapping[str, Callable[[TrainConfig, EvaluationConfig], Task]] = MappingProxyType({
    "sequence_classification": lambda train, evaluation: SEQUENCE_CLASSIFICATION,
    "token_classification": lambda train, evaluation: TOKEN_CLASSIFICATION,
    "question_answering": lambda train, evaluation: question_answering(evaluation),
    "causal_lm": lambda train, evaluation: CAUSAL_LM,
    "preference": lambda train, evaluation: preference(train),
})
