#!/bin/sh
# Build, check and measure on a GPU host, from a copy of the repository. Prints a short table at the end.
#
#   benchmarks/gpu.sh [--device cuda|cpu] [--quick] [--model FOLDER] [--results DIR] [--commit SHA] [STEP ...]
#
# Steps, by default all in this order: build test engine serve suite replicas table. If a host is available only for a
# short time at once, run them one by one with the same --results; `table` reads the results there. Nothing is installed:
# the requirements in pyproject.toml must be importable (PYTHONPATH, PYTHON). --model names a sentence-transformers folder
# if the model's package is not installed, and --commit the commit if git is not. `--device cpu` runs every step in small
# numbers on a machine without a card. The plots need matplotlib; `python -m benchmarks.report FILE.json` draws them
# later. If a step fails, the others still run, except after `build`; the last line names it, and the exit status is 1.
set -eu
cd "$(dirname "$0")/.."
device=cuda results=benchmarks/results commit='' model=all-MiniLM-L6-v2 quick='' steps=''
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift ;;
        --results) results=$2; shift ;;
        --commit) commit=$2; shift ;;
        --model) model=$2; shift ;;
        --quick) quick=1 ;;
        build | test | engine | serve | suite | replicas | table) steps="$steps $1" ;;
        *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
[ "$device" = cuda ] || quick=1
if [ -d "$model" ]; then model=$(cd "$model" && pwd); fi # the servers run in other folders
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$results"
settings="{\"model\": {\"device\": \"$device\", \"name\": \"$model\"}}"
set -- --results "$results" ${commit:+--commit "$commit"}

take() {
    step=$1
    shift
    case $step in
        build)
            [ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
            "$PYTHON" -m compileall -q deployments store memserve benchmarks
            "$PYTHON" -m benchmarks.machine
            "$PYTHON" -c "import ray.serve, hnswlib, torch; assert '$device' == 'cpu' or torch.cuda.is_available()"
            ;;
        test)
            # A folder with the name of the model in the working directory replaces its package.
            if [ -d "$model" ] && [ ! -e all-MiniLM-L6-v2 ]; then
                ln -s "$model" all-MiniLM-L6-v2
                trap 'rm -f all-MiniLM-L6-v2' EXIT
            fi
            # One file only: to collect all tests, the packages of the other tests would be needed.
            tests=$([ "$device" = cpu ] && echo test_engine || echo local/test_cuda)
            "$PYTHON" -m pytest -p no:cacheprovider -rs "tests/embedding/$tests.py"
            ;;
        engine)
            "$PYTHON" -m benchmarks.gpu engine --device "$device" --model "$model" ${quick:+--texts 512 --repeats 2} "$@"
            ;;
        serve)
            "$PYTHON" -m benchmarks.gpu serve --device "$device" --model "$model" \
                ${quick:+--clients 16 64 --repeats 1 --measure-s 2} "$@"
            ;;
        suite) "$PYTHON" -m benchmarks.suite --quick --args "$settings" "$@" ;;
        replicas)
            "$PYTHON" -m benchmarks.growth --only replicas --args "$settings" --rounds ${quick:-3} \
                --replicas "$([ "$device" = cpu ] && echo 1,2 || echo 1,2,4,8,16)" "$@"
            ;;
        table) "$PYTHON" -m benchmarks.gpu table "$results"/gpu-*.json ;;
    esac
}

failed=''
for step in ${steps:-build test engine serve suite replicas table}; do
    echo "== $step" >&2
    set +e
    (set -e; take "$step" "$@")
    status=$?
    set -e
    if [ $status -ne 0 ]; then
        failed="$failed $step"
        [ "$step" != build ] || break
    fi
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
