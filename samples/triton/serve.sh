#!/usr/bin/env bash
# Start the tritonserver that is inside the wheel nvidia-pytriton, on loopback: serve.sh PYTHON PORT REPOSITORY [OPTION..]
# PORT serves HTTP, PORT + 1 gRPC, PORT + 2 metrics. PYTHON is that of an environment with the wheel, dynexport and
# numpy < 2 (`make .venv-triton/.installed`). Without the wheel, NVIDIA's container does the same: see README.md.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") port=$2 repository=$3
shift 3
ask() { "$python" -c "$1"; }
package=$(ask 'import importlib.util as u; print(*u.find_spec("pytriton").submodule_search_locations)')
version=$(ask 'import sys; print("%d.%d" % sys.version_info[:2])')

# The Python backend wants its stub, which is built for one version of Python, beside it.
backends=$(cd "$(dirname "$python")/.." && pwd)/triton-backends
if [ ! -x "$backends/python/triton_python_backend_stub" ]; then
  mkdir -p "$backends"
  cp -r "$package/tritonserver/backends/python" "$backends/"
  cp "$package/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" "$backends/python/"
fi
# The stub loads the interpreter's library, and is told where the environment's packages are.
LD_LIBRARY_PATH=$(ask 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))'):$package/../nvidia_pytriton.libs
PYTHONPATH=$(ask 'import sysconfig; print(sysconfig.get_path("purelib"))')
PATH=$(dirname "$python"):$PATH
export LD_LIBRARY_PATH PYTHONPATH PATH

exec "$package/tritonserver/bin/tritonserver" --model-repository="$repository" --backend-directory="$backends" \
  --http-address=127.0.0.1 --http-port="$port" --grpc-address=127.0.0.1 --grpc-port=$((port + 1)) \
  --metrics-address=127.0.0.1 --metrics-port=$((port + 2)) --allow-gpu-metrics=false --log-verbose=0 "$@"
