"""The results contract: one explicit schema per Parquet dataset, with unit and meaning of every column.

The writer builds every table with these schemas and the reader casts to them, so that an empty dataset has types too.
Column names and units are what other people's SQL relies on: add columns, never rename or retype them.

Columns are plain data, and `SCHEMAS` is built at its first use: the command line answers a question over a small study
without paying for pyarrow.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION: Final = 1
VERSION_KEY: Final = b"fixstudy_schema_version"

Outcome = Literal["OK", "CORRUPTED", "FAILURE", "UNADAPTABLE"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
DatasetName = Literal[
    "subjects", "trials", "predictions", "curves", "test_samples", "failure_types", "type_trials", "type_matrix"
]
DATASETS: Final[tuple[DatasetName, ...]] = get_args(DatasetName)


Kind = Literal["string", "bool", "int8", "int16", "int32", "int64", "float64", "timestamp", "list<int32>", "map"]


@dataclass(frozen=True)
class Column:
    """One column of a dataset."""

    name: str
    kind: Kind
    meaning: str
    unit: str = ""

    @property
    def sql_type(self) -> str:
        """The type in DuckDB's SQL."""
        return _SQL_TYPES[self.kind]


_SQL_TYPES: Final[dict[Kind, str]] = {
    "string": "VARCHAR",
    "bool": "BOOLEAN",
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
    "list<int32>": "INTEGER[]",
    "map": "MAP(VARCHAR, VARCHAR)",
}


_SUBJECTS = (
    Column("subject", "string", "name in the study file"),
    Column("fingerprint", "string", "hash of data, splits, architecture and original weights"),
    Column("dataset", "string", "name of the dataset"),
    Column("architecture", "string", "name of the architecture"),
    Column("n_classes", "int32", "number of classes"),
    Column("input_shape", "list<int32>", "shape of one input, channels first"),
    Column("n_parameters", "int64", "trainable parameters of the original model"),
    Column("n_train", "int64", "samples in the train split", "samples"),
    Column("n_valid", "int64", "samples in the valid split", "samples"),
    Column("n_repair", "int64", "samples in the repair split", "samples"),
    Column("n_test", "int64", "samples in the test split", "samples"),
    Column("accuracy_train", "float64", "accuracy of the original model on train", "fraction"),
    Column("accuracy_valid", "float64", "accuracy of the original model on valid", "fraction"),
    Column("accuracy_repair", "float64", "accuracy of the original model on repair", "fraction"),
    Column("accuracy_test", "float64", "accuracy of the original model on test", "fraction"),
    Column("aaod_original", "float64", "AAOD of the original model on test; null without groups", "fraction"),
    Column("sensitive_attribute", "string", "what the two groups are; null without"),
    Column("epsilon", "float64", "radius of the L-infinity attack, on inputs in [0, 1]", "fraction"),
    Column("split_hash", "string", "hash of the contents of the four splits"),
    Column("original_seconds", "float64", "time to train the original model; null when it was given", "seconds"),
    Column(
        "parity_inputs",
        "int64",
        "inputs of valid on which the imported model was held against its ONNX file in onnxruntime; null when it "
        "wasn't imported",
        "samples",
    ),
    Column("parity_same_class", "int64", "of those, inputs for which both predict the same class", "samples"),
    Column(
        "parity_max_difference",
        "float64",
        "largest |difference| of what the file puts out: probabilities if it ends in a Softmax, else logits",
    ),
    Column(
        "onnx_reader",
        "string",
        "fixstudy, or onnx2torch where that read some operators of the ONNX file; null when it wasn't imported",
    ),
    Column("description", "string", "where data and model come from"),
)

_TRIALS = (
    Column("trial_id", "string", "hash of what determines the trial"),
    Column("study", "string", "name of the study"),
    Column("stage", "string", "adapt (hyper-parameter sweep, judged on valid), final, or type in type_trials"),
    Column(
        "short_rung",
        "bool",
        "whether successive halving gave it a part of the effort only, so that it stands for no configuration; null in "
        "final and older trials",
    ),
    Column("subject", "string", "name of the subject"),
    Column("dataset", "string", "name of the dataset"),
    Column("architecture", "string", "name of the architecture"),
    Column("fixer", "string", "registry name of the approach"),
    Column("abbreviation", "string", "the study's abbreviation of the approach"),
    Column("level", "string", "model, layer or neuron"),
    Column("params", "string", "all hyper-parameters as canonical JSON"),
    Column("seed", "int64", "seed of the fix"),
    Column("outcome", "string", "OK, CORRUPTED, FAILURE or UNADAPTABLE"),
    Column("reason_code", "string", "why, for machines; null when OK"),
    Column("reason", "string", "why, as one sentence; null when OK"),
    Column("accuracy_original", "float64", "accuracy of the original model on test; higher is better", "fraction"),
    Column("accuracy_fixed", "float64", "accuracy of the fixed model on test; higher is better", "fraction"),
    Column("repair_rate", "float64", "RR: n_repaired / n_wrong; higher is better", "fraction"),
    Column("negative_flip_rate", "float64", "NFR: n_broken / n_test; lower is better", "fraction"),
    Column("asr_original", "float64", "attack success rate against the original; lower is better", "fraction"),
    Column("asr_fixed", "float64", "attack success rate against the fixed model; lower is better", "fraction"),
    Column("masked_original", "float64", "share of attacks on the original that had no gradient to follow", "fraction"),
    Column("masked_fixed", "float64", "share of attacks on the fixed model that had no gradient to follow", "fraction"),
    Column("aaod_original", "float64", "AAOD of the original model; lower is fairer", "fraction"),
    Column("aaod_fixed", "float64", "AAOD of the fixed model; lower is fairer", "fraction"),
    Column("accuracy_valid_original", "float64", "accuracy of the original model on valid", "fraction"),
    Column("accuracy_valid_fixed", "float64", "accuracy of the fixed model on valid: selects in adapt", "fraction"),
    Column("repair_rate_valid", "float64", "RR on valid", "fraction"),
    Column("negative_flip_rate_valid", "float64", "NFR on valid", "fraction"),
    Column("n_test", "int64", "samples in the test split", "samples"),
    Column("n_wrong", "int64", "test samples the original gets wrong", "samples"),
    Column("n_repaired", "int64", "of those, samples the fixed model gets right", "samples"),
    Column("n_broken", "int64", "test samples only the original gets right", "samples"),
    Column("n_attacked", "int64", "samples that ASR is a share of", "samples"),
    Column(
        "aaod_undefined_classes",
        "int64",
        "classes for which a group has no TPR or FPR; such a rate counts as zero",
        "classes",
    ),
    Column("fix_seconds", "float64", "time of the fix alone", "seconds"),
    Column("evaluate_seconds", "float64", "time of the evaluation", "seconds"),
    Column("load_seconds", "float64", "time to get the subject to the worker", "seconds"),
    Column("peak_host_bytes", "int64", "largest resident memory of the worker while fixing", "bytes"),
    Column(
        "peak_own_bytes",
        "int64",
        "of that what no other process shares: without libraries and the subject's arrays; null in older rows",
        "bytes",
    ),
    Column("peak_device_bytes", "int64", "largest device memory allocated while fixing; null on a CPU", "bytes"),
    Column("attempts", "int32", "attempts made, retries after out-of-memory included"),
    Column("attempt_log", "string", "JSON list: per attempt micro_batch, seconds, error"),
    Column("traceback", "string", "last 32,000 characters of the traceback; null unless FAILURE"),
    Column("phase", "string", "phase in which a FAILURE happened: load, fix or evaluate"),
    Column("notes", "string", "facts that the fixer recorded, as a JSON object"),
    Column("attack", "string", "settings of the attack as JSON; null when none was run"),
    Column("device", "string", "cpu or the name of the GPU"),
    Column("gpu_shared", "bool", "whether it was given part of a GPU, which other trials may use"),
    Column("gpu_share", "float64", "part of a GPU that the trial was given; null on a CPU", "fraction"),
    Column("gpu", "string", "number of the GPU on its node, several with commas; null on a CPU"),
    Column("cores_given", "float64", "cores that the trial was given; null in older rows", "cores"),
    Column("cores_of_node", "float64", "cores that its node has for trials; null in older rows", "cores"),
    Column("cores", "float64", "cores busy while fixing, on average: CPU seconds of the process over seconds"),
    Column("host", "string", "name of the node"),
    Column("started_at", "timestamp", "start of the trial"),
    Column("run", "int64", "which run of the study wrote the row: each has a larger number than all rows before it"),
    Column("subject_fingerprint", "string", "fingerprint of the subject"),
    Column("code_version", "string", "hash of the code of the approach"),
    Column("fixstudy_version", "string", "version of this package"),
    Column("torch_version", "string", "version of torch"),
    Column("log_tail", "string", "last lines that the trial printed, warned or logged; null where there are none"),
)

_PREDICTIONS = (
    Column("trial_id", "string", "the trial"),
    Column("sample_id", "int32", "position in the subject's test split"),
    Column("label", "int16", "true class"),
    Column("group", "int8", "group of the sensitive attribute, 0 or 1; null without"),
    Column("original", "int16", "class the original model predicts"),
    Column("fixed", "int16", "class the fixed model predicts"),
)

_CURVES = (
    Column("trial_id", "string", "the trial"),
    Column("step", "int64", "epoch, generation or iteration, as the approach counts"),
    Column("metric", "string", "name of the figure"),
    Column("value", "float64", "the figure"),
    Column("seconds", "float64", "time since the start of the fix", "seconds"),
)

_TEST_SAMPLES = (
    Column("subject_fingerprint", "string", "fingerprint of the subject, as its trials have it"),
    Column("sample_id", "int32", "position in the subject's test split, as in predictions"),
    Column("label", "int16", "true class"),
    Column("class_name", "string", "name of the true class; null where classes have numbers only"),
    Column("group", "int8", "group of the sensitive attribute, 0 or 1; null without"),
    Column("group_name", "string", "name of the group; null without"),
    Column("metadata", "map", "what else the dataset says of the sample, by name, as text"),
)


_FAILURE_TYPES = (
    Column("study", "string", "name of the study"),
    Column("subject", "string", "name of the subject"),
    Column("subject_fingerprint", "string", "fingerprint of the subject"),
    Column("grouping", "string", "how failures were divided into types, as the study file calls it"),
    Column("grouping_key", "string", "hash of what determines the types; type_trials have it, too"),
    Column("seed", "int64", "seed of the grouping, the division and the repairs"),
    Column("source", "string", "split of the subject that the failure is of: repair or test"),
    Column("sample_id", "int32", "position in that split"),
    Column("split", "string", "what the failure is for: train, valid, test, or aside where its type is too small"),
    Column("type", "int16", "failure type, from 1, the largest first"),
    Column("type_name", "string", "value that the type stands for; null for clusters"),
    Column("distance", "float64", "distance to the centre of its type; null for groupings without centres"),
    Column("x", "float64", "place on a map of the failures"),
    Column("y", "float64", "likewise"),
    Column("label", "int16", "true class"),
    Column("prediction", "int16", "class the original model predicts"),
    Column("class_name", "string", "name of the true class; null where classes have numbers only"),
    Column("prediction_name", "string", "name of the predicted class; null likewise"),
    Column("metadata", "map", "what else the dataset says of the sample, by name, as text"),
    Column("facts", "string", "how the types were found, as JSON; the same for all failures of a grouping and seed"),
    Column("picture", "string", "small PNG in base64, of the failures nearest to the centres; null for the others"),
)

_TYPE_TRIALS = (
    *_TRIALS,
    Column("grouping", "string", "how failures were divided into types, as the study file calls it"),
    Column("grouping_key", "string", "hash of what determines the types"),
    Column("type", "int16", "failure type that was repaired; null for all of them"),
    Column("repair", "string", "matrix (what Learnability is measured by), another way of repair, or an approach"),
    Column("accuracy_c_original", "float64", "accuracy of the original on right samples that judge: 1", "fraction"),
    Column("accuracy_c", "float64", "accuracy of the repaired model on these; higher is better", "fraction"),
    Column("accuracy_type", "float64", "its accuracy on failures that judge, of the types repaired", "fraction"),
    Column("epochs_rejected", "int64", "epochs that were better on failures and kept too few right samples", "epochs"),
    Column("note", "string", "what is to be known of the trial, as a sentence; null where nothing is"),
)

_TYPE_MATRIX = (
    Column("trial_id", "string", "the type trial"),
    Column("type_of_test", "string", "failure type, from 1; C for what the original gets right; All for both"),
    Column("accuracy", "float64", "accuracy of the repaired model on samples that judge; higher is better", "fraction"),
    Column("n", "int64", "how many there are", "samples"),
)

COLUMNS: Final[dict[DatasetName, tuple[Column, ...]]] = {
    "subjects": _SUBJECTS,
    "trials": _TRIALS,
    "predictions": _PREDICTIONS,
    "curves": _CURVES,
    "test_samples": _TEST_SAMPLES,
    "failure_types": _FAILURE_TYPES,
    "type_trials": _TYPE_TRIALS,
    "type_matrix": _TYPE_MATRIX,
}

SCHEMAS: "dict[DatasetName, pa.Schema]"


@cache
def _schemas() -> "dict[DatasetName, pa.Schema]":
    import pyarrow as pa

    types: dict[Kind, pa.DataType] = {
        "string": pa.string(),
        "bool": pa.bool_(),
        "int8": pa.int8(),
        "int16": pa.int16(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "list<int32>": pa.list_(pa.int32()),
        "map": pa.map_(pa.string(), pa.string()),
    }
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode()}
    return {
        name: pa.schema(
            [pa.field(c.name, types[c.kind], metadata={"unit": c.unit, "meaning": c.meaning}) for c in columns],
            metadata,
        )
        for name, columns in COLUMNS.items()
    }


def __getattr__(name: str) -> "dict[DatasetName, pa.Schema]":
    if name == "SCHEMAS":
        return _schemas()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


LEVELS: Final = ("model", "layer", "neuron")
