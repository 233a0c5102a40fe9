#!/bin/sh
# Generate the gRPC stubs in proto/capo_proto from proto/capo/v1/*.proto.
#
# protoc derives Python import paths from file paths: capo/v1/x.proto would become `from capo.v1 import x_pb2`, inside
# the application's own package. The stubs live in a package of their own instead, and its name is put in here.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
out=proto/capo_proto
rm -rf "$out" && mkdir -p "$out"
"$python" -W ignore -m grpc_tools.protoc -I proto --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" proto/capo/v1/*.proto
mv "$out"/capo/v1 "$out"/v1 && rmdir "$out"/capo
sed -i 's/^from capo\.v1 import/from capo_proto.v1 import/' "$out"/v1/*.py "$out"/v1/*.pyi
echo '"""Generated from proto/capo/v1 by `make proto`. Do not edit."""' | tee "$out/__init__.py" >"$out/v1/__init__.py"
touch "$out/py.typed"
