"""Make the case `vqa_accuracy`: accuracies of VQA by two revisions of the official `vqaEval.py`.

Run: python -m tests.golden.make.vqa_accuracy CHECKOUT_OF_ELIP CHECKOUT_OF_VQA PYTHON_2_7
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from tests.golden.make.common import COMMITS, FOLDER

SOURCES = {  # by the year of the rule
    "2017": ("ELIP", "ALBEF/vqaTools/vqaEval.py"),
    "2021": ("VQA", "PythonEvaluationTools/vqaEvaluation/vqaEval.py"),
}
PREDICTED = (  # all people give the first answer; the second one is predicted
    ("none", "none"),
    ("none", "0"),
    ("t-shirt", "t-shirt"),
    ("t-shirt", "t shirt"),
    ("a", "a"),
    ("the dog", "dog"),
    ("dog", "the dog"),
    ("Dog", "dog"),
    ("two", "2"),
    ("2", "two"),
    ("don't", "dont"),
    ("dont", "dont"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("no.", "no."),
    ("yes", "Yes!"),
    ("yes", " yes\n"),
    ("yes ", "yes"),
    ("2.5", "2.5"),
    ("its", "it's"),
    ("im", "im"),
)
GIVEN = (  # (answer, number of people) of ten people, and the prediction
    ({"two": 9, "2": 1}, "2"),
    ({"two": 9, "2": 1}, "two"),
    ({"2": 7, "3": 3}, "two"),
    ({"t-shirt": 9, "shirt": 1}, "t-shirt"),
    ({"t-shirt": 4, "t shirt": 3, "shirt": 3}, "t shirt"),
    ({"none": 8, "0": 2}, "none"),
    ({"don't": 5, "dont": 5}, "dont"),
    ({"don't": 5, "do not": 5}, "don't"),
    ({"shes": 6, "she's": 4}, "shes"),
    ({"couldnt've": 3, "couldn't've": 7}, "couldn'tve"),
    ({"somebody'd": 5, "somebodyd": 5}, "somebody'd"),
    ({"I'm": 4, "im": 6}, "I'm"),
    ({"1,000": 3, "1000": 3, "1 000": 4}, "1,000"),
    ({"1,000 - 2,000": 6, "1000 2000": 4}, "1,000-2,000"),
    ({"red, blue": 2, "red blue": 3, "red,blue": 5}, "red,blue"),
    ({"black/white": 6, "black and white": 4}, "black / white"),
    ({"mr. smith": 6, "mr smith": 4}, "Mr. Smith"),
    ({"2.5": 6, "2.5.": 4}, "2.5."),
    ({".5": 6, "0.5": 4}, ".5"),
    ({"the dog": 4, "dog": 4, "a dog": 2}, "dog"),
    ({"a": 6, "b": 4}, "a"),
    ({"yes": 8, "Yes": 2}, "YES"),
    ({"yes": 1, "no": 9}, "yes"),
    ({"yes": 2, "no": 8}, "yes"),
    ({"yes": 3, "no": 7}, "yes"),
    ({"yes": 4, "no": 6}, "yes"),
    ({"ten\tmen": 6, "10 men": 4}, "ten men"),
    ({"yes": 9, "yes ": 1}, "yes"),
    ({"girl's": 7, "girls": 3}, "girls'"),
    ({"50%": 7, "50": 3}, "50%"),
    ({"3 oclock": 7, "3:00": 3}, "3 o'clock"),
    ({f"word{i}": 1 for i in range(10)}, "word3"),
    ({f"word{i}": 1 for i in range(10)}, "word"),
)
RUN = """
import json, sys
names = {"__name__": "vqaEval"}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), names)

class Answers:
    def __init__(self, qa):
        self.qa = qa
    def getQuesIds(self):
        return list(self.qa)

found = []
for given, predicted in json.load(sys.stdin):
    answers = [{"answer": each, "answer_id": i} for i, each in enumerate(given)]
    people = {"answers": answers, "question_type": "what", "answer_type": "other"}
    judged = names["VQAEval"](Answers({0: people}), Answers({0: {"answer": predicted}}), n=6)
    judged.evaluate()
    found.append(judged.accuracy["overall"])
print("\\n" + json.dumps(found))
"""


def accuracies(python, file, cases):
    """Return the official percentages of the cases."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", RUN, str(file)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(elip, vqa, python2):
    cases = [([given] * 10, predicted) for given, predicted in PREDICTED]
    cases += [
        ([answer for answer, people in given.items() for _ in range(people)], predicted)
        for given, predicted in GIVEN
    ]
    meta, found = {}, []
    for (year, (source, file)), root, python in zip(
        SOURCES.items(), (elip, vqa), (sys.executable, python2), strict=True
    ):
        path = Path(root, file)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        meta[year] = {"source": COMMITS[source], "sha256": {file: digest}}
        found.append(accuracies(python, path, cases))
    rows = [
        {"answers": given, "predicted": predicted, "2017": by_2017, "2021": by_2021}
        for (given, predicted), by_2017, by_2021 in zip(cases, *found, strict=True)
    ]
    listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = f'{{\n "revisions": {json.dumps(meta)},\n "cases": [\n{listed}\n ]\n}}\n'
    (FOLDER / "vqa_accuracy.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
