# An application behind kamal-proxy. kamal-proxy.toml beside it is the same for portero-py.

kamal-proxy run --http-port 80 --https-port 443 --metrics-port 9000 &

kamal-proxy deploy app --target 10.0.0.11:3000 \
  --host app.example --host www.app.example --canonical-host app.example --tls \
  --health-check-path /up --health-check-interval 1s --health-check-timeout 5s \
  --target-timeout 30s --drain-timeout 30s \
  --buffer-requests --max-request-body 1000000

kamal-proxy deploy api --target 10.0.0.21:3000 --host app.example --path-prefix /api
