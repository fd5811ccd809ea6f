"""The results contract: one explicit schema per Parquet dataset, with unit and meaning of every column.

The writer builds every table with these schemas and the reader falls back on them for an empty dataset. Column names
and units are what other people's SQL relies on: add columns, never rename or retype them.
"""

from typing import Final, Literal, get_args

import pyarrow as pa

SCHEMA_VERSION: Final = 1
VERSION_KEY: Final = b"fixstudy_schema_version"

Outcome = Literal["OK", "CORRUPTED", "FAILURE", "UNADAPTABLE"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
DatasetName = Literal["subjects", "trials", "predictions", "curves"]


def _field(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit, "meaning": meaning})


_SUBJECTS = (
    _field("subject", pa.string(), "name in the study file"),
    _field("fingerprint", pa.string(), "hash of data, splits, architecture and original weights"),
    _field("dataset", pa.string(), "name of the dataset"),
    _field("architecture", pa.string(), "name of the architecture"),
    _field("n_classes", pa.int32(), "number of classes"),
    _field("input_shape", pa.list_(pa.int32()), "shape of one input, channels first"),
    _field("n_parameters", pa.int64(), "trainable parameters of the original model"),
    _field("n_train", pa.int64(), "samples in the train split", "samples"),
    _field("n_valid", pa.int64(), "samples in the valid split", "samples"),
    _field("n_repair", pa.int64(), "samples in the repair split", "samples"),
    _field("n_test", pa.int64(), "samples in the test split", "samples"),
    _field("accuracy_train", pa.float64(), "accuracy of the original model on train", "fraction"),
    _field("accuracy_valid", pa.float64(), "accuracy of the original model on valid", "fraction"),
    _field("accuracy_repair", pa.float64(), "accuracy of the original model on repair", "fraction"),
    _field("accuracy_test", pa.float64(), "accuracy of the original model on test", "fraction"),
    _field("aaod_original", pa.float64(), "AAOD of the original model on test; null without groups", "fraction"),
    _field("sensitive_attribute", pa.string(), "what the two groups are; null without"),
    _field("epsilon", pa.float64(), "radius of the L-infinity attack, on inputs in [0, 1]", "fraction"),
    _field("split_hash", pa.string(), "hash of the contents of the four splits"),
    _field("original_seconds", pa.float64(), "time to train the original model; null when it was given", "seconds"),
    _field("description", pa.string(), "where data and model come from"),
)

_TRIALS = (
    _field("trial_id", pa.string(), "hash of what determines the trial"),
    _field("study", pa.string(), "name of the study"),
    _field("stage", pa.string(), "adapt (hyper-parameter sweep, judged on valid) or final"),
    _field("subject", pa.string(), "name of the subject"),
    _field("dataset", pa.string(), "name of the dataset"),
    _field("architecture", pa.string(), "name of the architecture"),
    _field("fixer", pa.string(), "registry name of the approach"),
    _field("abbreviation", pa.string(), "the study's abbreviation of the approach"),
    _field("level", pa.string(), "model, layer or neuron"),
    _field("params", pa.string(), "all hyper-parameters as canonical JSON"),
    _field("seed", pa.int64(), "seed of the fix"),
    _field("outcome", pa.string(), "OK, CORRUPTED, FAILURE or UNADAPTABLE"),
    _field("reason_code", pa.string(), "why, for machines; null when OK"),
    _field("reason", pa.string(), "why, as one sentence; null when OK"),
    _field("accuracy_original", pa.float64(), "accuracy of the original model on test; higher is better", "fraction"),
    _field("accuracy_fixed", pa.float64(), "accuracy of the fixed model on test; higher is better", "fraction"),
    _field("repair_rate", pa.float64(), "RR: n_repaired / n_wrong; higher is better", "fraction"),
    _field("negative_flip_rate", pa.float64(), "NFR: n_broken / n_test; lower is better", "fraction"),
    _field("asr_original", pa.float64(), "attack success rate against the original; lower is better", "fraction"),
    _field("asr_fixed", pa.float64(), "attack success rate against the fixed model; lower is better", "fraction"),
    _field("aaod_original", pa.float64(), "AAOD of the original model; lower is fairer", "fraction"),
    _field("aaod_fixed", pa.float64(), "AAOD of the fixed model; lower is fairer", "fraction"),
    _field("accuracy_valid_original", pa.float64(), "accuracy of the original model on valid", "fraction"),
    _field("accuracy_valid_fixed", pa.float64(), "accuracy of the fixed model on valid: selects in adapt", "fraction"),
    _field("repair_rate_valid", pa.float64(), "RR on valid", "fraction"),
    _field("negative_flip_rate_valid", pa.float64(), "NFR on valid", "fraction"),
    _field("n_test", pa.int64(), "samples in the test split", "samples"),
    _field("n_wrong", pa.int64(), "test samples the original gets wrong", "samples"),
    _field("n_repaired", pa.int64(), "of those, samples the fixed model gets right", "samples"),
    _field("n_broken", pa.int64(), "test samples only the original gets right", "samples"),
    _field("n_attacked", pa.int64(), "samples that ASR is a share of", "samples"),
    _field("aaod_undefined_classes", pa.int64(), "classes that a group lacks; their gaps count as zero", "classes"),
    _field("fix_seconds", pa.float64(), "time of the fix alone", "seconds"),
    _field("evaluate_seconds", pa.float64(), "time of the evaluation", "seconds"),
    _field("load_seconds", pa.float64(), "time to get the subject to the worker", "seconds"),
    _field("peak_host_bytes", pa.int64(), "largest resident memory of the worker while fixing", "bytes"),
    _field("peak_device_bytes", pa.int64(), "largest device memory allocated while fixing; null on a CPU", "bytes"),
    _field("attempts", pa.int32(), "attempts made, retries after out-of-memory included"),
    _field("attempt_log", pa.string(), "JSON list: per attempt micro_batch, seconds, error"),
    _field("traceback", pa.string(), "last 4,000 characters of the traceback; null unless FAILURE"),
    _field("phase", pa.string(), "phase in which a FAILURE happened: load, fix or evaluate"),
    _field("notes", pa.string(), "facts that the fixer recorded, as a JSON object"),
    _field("attack", pa.string(), "settings of the attack as JSON; null when none was run"),
    _field("device", pa.string(), "cpu or the name of the GPU"),
    _field("gpu_shared", pa.bool_(), "whether other trials used the same GPU"),
    _field("host", pa.string(), "name of the node"),
    _field("started_at", pa.timestamp("us", tz="UTC"), "start of the trial"),
    _field("subject_fingerprint", pa.string(), "fingerprint of the subject"),
    _field("code_version", pa.string(), "hash of the code of the approach"),
    _field("fixstudy_version", pa.string(), "version of this package"),
    _field("torch_version", pa.string(), "version of torch"),
)

_PREDICTIONS = (
    _field("trial_id", pa.string(), "the trial"),
    _field("sample_id", pa.int32(), "position in the subject's test split"),
    _field("label", pa.int16(), "true class"),
    _field("group", pa.int8(), "group of the sensitive attribute, 0 or 1; null without"),
    _field("original", pa.int16(), "class the original model predicts"),
    _field("fixed", pa.int16(), "class the fixed model predicts"),
)

_CURVES = (
    _field("trial_id", pa.string(), "the trial"),
    _field("step", pa.int64(), "epoch, generation or iteration, as the approach counts"),
    _field("metric", pa.string(), "name of the figure"),
    _field("value", pa.float64(), "the figure"),
    _field("seconds", pa.float64(), "time since the start of the fix", "seconds"),
)


def _schema(fields: tuple[pa.Field, ...]) -> pa.Schema:
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})


SCHEMAS: Final[dict[DatasetName, pa.Schema]] = {
    "subjects": _schema(_SUBJECTS),
    "trials": _schema(_TRIALS),
    "predictions": _schema(_PREDICTIONS),
    "curves": _schema(_CURVES),
}
