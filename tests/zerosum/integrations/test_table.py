"""Every cell of the table of docs/trainers.md that says "yes", "refused" or "scaled" has a test."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
CLAIMS = ("yes", "refused", "scaled")

T, S, L, A = "test_transformers.py", "test_trl.py", "test_lightning.py", "test_accelerate.py"
ONE_STEP = "test_what_is_logged_of_a_step_is_the_truth"
LOOP = "test_a_step_of_an_accelerated_loop_is_the_truth"
RESUMED, RAISED, PLAIN = (
    "test_a_resumed_run_goes_on_with_its_file",
    "test_an_exception_closes_the_probe",
    "test_training_is_the_plain_one",
)
DOCUMENTS = "test_documents_are_the_examples_and_the_fused_head_is_covered"
TESTS = {
    "accumulation, the right scale": {T: ONE_STEP, S: DOCUMENTS, L: ONE_STEP, A: LOOP},
    "clipping": {T: ONE_STEP, L: ONE_STEP, A: LOOP},
    "training stays as it was, to rounding": {T: PLAIN, L: PLAIN},
    "bfloat16 autocast": {T: "test_under_bfloat16_autocast", L: "test_in_bf16_mixed"},
    "activation checkpointing, reentrant too": {T: "test_with_gradient_checkpointing"},
    "`torch_compile`": {T: "test_a_compiled_model_is_measured"},
    "LoRA, DoRA, prompt tuning, prefix tuning": {T: "test_with_peft"},
    "padding-free and packed batches, by document": {S: DOCUMENTS},
    "fused head": {S: DOCUMENTS},
    "evaluation is not measured": {T: "test_evaluation_is_not_measured", L: ONE_STEP},
    "files that go on after a resume": {T: RESUMED, L: RESUMED},
    "TensorBoard, CSV": {T: "test_other_callbacks_and_tensorboard_get_flat_numbers", L: ONE_STEP},
    "exceptions close the probe": {T: RAISED, L: RAISED},
    "`compute_loss_func` of all rows": {T: "test_with_a_loss_function_of_ones_own"},
    "label smoothing": {T: "test_with_label_smoothing_the_scale_is_said"},
    "manual optimization": {L: "test_manual_optimization"},
    "several processes under DDP: one report of all examples": {
        T: "test_several_processes_have_one_report_of_all_examples",
        L: "test_several_processes_have_one_report_of_all_examples",
    },
    "`fully_shard` (FSDP2): the same": {
        T: "test_several_processes_are_refused",
        S: "test_several_processes_are_refused",
        L: "test_several_processes_have_one_report_of_all_examples",
    },
    "tensor parallelism": {T: "test_several_processes_are_refused", S: "test_several_processes_are_refused"},
    "DataParallel, FSDP1, DeepSpeed": {
        T: "test_several_devices_of_one_process_are_refused",
        S: "test_several_processes_are_refused",
        L: "test_several_processes_are_refused",
    },
}


def test_every_claim_of_the_table_has_a_test() -> None:
    text = (HERE.parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    lines = text.split("## What works")[1].split("\n\n")[1].splitlines()[2:]
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert rows.keys() == TESTS.keys()
    for claim, cells in rows.items():
        claimed = {file for file, cell in zip((T, S, L, A), cells, strict=True) if cell.startswith(CLAIMS)}
        assert claimed == TESTS[claim].keys(), claim
        for file, test in TESTS[claim].items():
            assert f"def {test}(" in (HERE / file).read_text(encoding="utf-8"), (file, test)
