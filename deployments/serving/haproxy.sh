#!/bin/sh
# HAProxy as `memserve serve` runs it: only the server's own port listens where the config file says.
#
# Ray starts this script in place of HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH), with the same arguments. The script changes
# the haproxy.cfg that Ray has just written, which Ray gives no variable for, and then becomes HAProxy:
# - The ports of HAProxy's own statistics and metrics listen on 127.0.0.1, not on all interfaces.
# - The server's port listens on $SERVE_HAPROXY_BIND. Serve itself is told 127.0.0.1, so the gateways, which listen on
#   Serve's address, cannot be reached beside HAProxy.
# - Only this account may use HAProxy's administration socket.
# If haproxy.cfg is not as expected, nothing is started: a port must not be open by mistake.
#
# $SERVE_HAPROXY_BINARY is HAProxy, $SERVE_HAPROXY_BIND the address and port as HAProxy writes them.
set -eu

file=
previous=
for argument do
  if [ "$previous" = -f ]; then file=$argument; fi
  previous=$argument
done

sed -i \
  -e '/^frontend prometheus$/{n;s/^ *bind :\([0-9]*\)$/    bind 127.0.0.1:\1/;}' \
  -e "/^frontend http_frontend\$/{n;s/^ *bind .*/    bind $SERVE_HAPROXY_BIND/;}" \
  -e '/^listen stats$/{n;s/^ *bind \*:\([0-9]*\)$/  bind 127.0.0.1:\1/;}' \
  -e 's/^\( *stats socket .*\) mode 666 level admin/\1 mode 600 level admin/' \
  "$file"

others=$(grep '^ *bind ' "$file" | grep -v '^ *bind 127\.0\.0\.1:[0-9]*$' | grep -vFx "    bind $SERVE_HAPROXY_BIND" || :)
if [ -n "$others" ] || ! grep -Fxq "    bind $SERVE_HAPROXY_BIND" "$file" ||
  ! grep -q '^ *stats socket .* mode 600 level admin' "$file"; then
  echo "memserve: haproxy.cfg is not as Ray 2.60 writes it: $file" >&2
  exit 1
fi

exec "$SERVE_HAPROXY_BINARY" "$@"
