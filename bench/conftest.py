"""What a result file says of where it was made: versions and processor, not whose machine it was."""

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    for key in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(key, None)
    machine_info["cpu"] = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "count", "arch")}
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    output_json["command"] = "pytest bench --benchmark-only --benchmark-json FILE"
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark["options"].pop("timer", None)
