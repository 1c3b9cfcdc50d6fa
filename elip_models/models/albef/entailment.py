"""ALBEF fine-tuned for visual entailment (SNLI-VE).

Source: ALBEF's models/model_ve.py, VE.py and configs/VE.yaml.
"""

from dataclasses import dataclass

from elip_models.models.albef.downstream import ALBEFClassifier, ALBEFClassifierConfig
from elip_models.validation import NonNegative, Size


@dataclass(frozen=True, kw_only=True)
class ALBEFEntailmentConfig(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for entailment; the defaults are the official code's.

    The fields: see `ALBEFClassifierConfig`; alpha is not warmed up.
    """

    num_classes: Size = 3
    alpha_warmup_epochs: NonNegative = 0.0


class ALBEFEntailment(ALBEFClassifier):
    """ALBEF that says whether an image entails a hypothesis.

    Classes: entailment, neutral, contradiction; in the official code's weights they are the other
    way round.
    """

    family = "albef_entailment"
    task = "entailment"
    config_class = ALBEFEntailmentConfig
    config: ALBEFEntailmentConfig
