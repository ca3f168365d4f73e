{{- define "lawnwatch.name" -}}
{{- if contains "lawnwatch" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-lawnwatch" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- /* Labels of a part: (list $ "api"). */}}
{{- define "lawnwatch.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | replace "+" "_" | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: lawnwatch
{{ include "lawnwatch.selector" . }}
{{- end }}

{{- define "lawnwatch.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: lawnwatch
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "lawnwatch.image" -}}
{{- $root := index . 0 -}}
image: {{ printf "%s/%s:%s" $root.Values.image.registry (index . 1) ($root.Values.image.tag | default $root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
{{- end }}

{{- /* Pod Security "restricted", for every pod: (list $ uid serviceAccount). */}}
{{- define "lawnwatch.pod" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ printf "%s-%s" (include "lawnwatch.name" $root) (index . 2) }}
enableServiceLinks: false    # LAWNWATCH_API_PORT=tcp://… would look like a setting of ours
automountServiceAccountToken: {{ has (index . 2) (list "airflow" "rollout" "secrets") }}
{{- include "lawnwatch.pullSecrets" $root }}
{{- range $field, $value := $root.Values.scheduling }}
{{- if $value }}
{{ $field }}: {{ toJson $value }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ index . 1 }}
  runAsGroup: {{ index . 1 }}
  fsGroup: {{ index . 1 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /*
Annotations of a pod, with those of `podAnnotations`: (list $ ITS-OWN SETTINGS). A value that its settings take from a Secret starts it anew once it changed, at the
next upgrade. They hold a hash of those values and not the Secret's version, so that the first upgrade finds what the install
wrote, and a Secret's other keys do not count; with a random key among them, it tells nothing of a password. Where the Secrets
are not known there is none.
*/}}
{{- define "lawnwatch.podAnnotations" }}
{{- $root := index . 0 }}
{{- $annotations := index . 1 }}
{{- $values := dict }}
{{- range regexFindAll "secret(Key)?Ref: {.+?}" (index . 2) -1 }}
{{- $from := regexReplaceAll "^\\w+: " . "" | fromYaml }}
{{- $data := include "lawnwatch.secretData" (list $root $from.name) | fromJson }}
{{- with hasKey $from "key" | ternary (get $data ($from.key | default "")) $data }}{{ $_ := set $values (toJson $from) . }}{{ end }}
{{- end }}
{{- if $values }}{{ $_ := set $annotations "checksum/secrets" (toJson $values | sha256sum) }}{{ end }}
{{- with merge $annotations $root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lawnwatch.pullSecrets" }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "lawnwatch.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "lawnwatch.mysqlSecret" -}}{{ .Values.secrets.mysql | default (printf "%s-mysql" (include "lawnwatch.name" .)) }}{{- end }}
{{- define "lawnwatch.storeSecret" -}}{{ .Values.secrets.store | default (printf "%s-store" (include "lawnwatch.name" .)) }}{{- end }}
{{- define "lawnwatch.airflowSecret" -}}{{ .Values.secrets.airflow | default (printf "%s-airflow" (include "lawnwatch.name" .)) }}{{- end }}

{{- define "lawnwatch.mysqlHost" -}}
{{- if and .Values.mysql.enabled .Values.mysql.host }}{{ fail "mysql.host is for a MySQL of your own: set mysql.enabled=false, too, or leave it empty" }}{{ end -}}
{{- if .Values.mysql.enabled }}{{ include "lawnwatch.name" . }}-mysql{{ else }}{{ required "mysql.host is needed when mysql.enabled is false" .Values.mysql.host }}{{ end -}}
{{- end }}

{{- /* What is added to the URL of a MySQL whose certificate is verified: by the CA and by its name. */}}
{{- define "lawnwatch.mysqlTls" -}}
{{- with .Values.mysql.caSecret }}
{{- if $.Values.mysql.enabled }}{{ fail "mysql.caSecret is for a MySQL of your own: set mysql.enabled=false and mysql.host, or leave it empty" }}{{ end -}}
?ssl_ca=/etc/lawnwatch-mysql/ca.crt
{{- end }}
{{- end }}

{{- /* For those that ask MySQL: nothing, or its CA, on a line of its own. */}}
{{- define "lawnwatch.mysqlCaMount" -}}
{{- if .Values.mysql.caSecret }}
- {name: mysql-ca, mountPath: /etc/lawnwatch-mysql, readOnly: true}
{{- end }}
{{- end }}
{{- define "lawnwatch.mysqlCaVolume" -}}
{{- with .Values.mysql.caSecret }}
- {name: mysql-ca, secret: {secretName: {{ . }}}}
{{- end }}
{{- end }}

{{- define "lawnwatch.storeEndpoint" -}}
{{- $names := dict "lawnwatch" "lawnwatch" "airflow" "airflow-logs" "mlflow" "mlflow" }}
{{- if and .Values.minio.enabled (or .Values.minio.endpoint (ne (toJson .Values.minio.buckets) (toJson $names)) (ne (toJson .Values.minio.accessKeys) (toJson $names))) }}
{{- fail "minio.endpoint, minio.buckets and minio.accessKeys are for an S3 of your own: set minio.enabled=false, too, or leave them as they are" }}
{{- end -}}
{{- if .Values.minio.enabled }}http://{{ include "lawnwatch.name" . }}-minio:9000{{ else }}{{ required "minio.endpoint is needed when minio.enabled is false" .Values.minio.endpoint }}{{ end -}}
{{- end }}

{{- define "lawnwatch.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}}
{{- end }}

{{- /* For API, steps and what belongs to them: nothing, or a Secret of settings. What `env` names comes first. */}}
{{- define "lawnwatch.envFrom" }}
{{- with .Values.secrets.env }}
envFrom: [{secretRef: {name: {{ . }}}}]
{{- end }}
{{- end }}

{{- /* For those that ask the API: nothing, or the key on a line of its own. */}}
{{- define "lawnwatch.apiKeyEnv" -}}
{{- with .Values.secrets.apiKey }}
{{ include "lawnwatch.secretEnv" (list "LAWNWATCH_API_KEY" . "api-key") }}
{{- end }}
{{- end }}

{{- /* Where a person's browser reaches the API: what links to reports begin with. */}}
{{- define "lawnwatch.publicUrl" -}}
{{- if .Values.publicUrl }}{{ .Values.publicUrl }}
{{- else if .Values.ingress.enabled }}{{ .Values.ingress.tlsSecret | empty | ternary "http" "https" }}://{{ .Values.ingress.host }}/api
{{- else if .Values.httpRoute.enabled }}https://{{ .Values.httpRoute.host }}/api
{{- else }}http://localhost:8000
{{- end }}
{{- end }}

{{- /* Settings of ours, with somebody's own in the place of those of the same name: (list TEXT VALUES). */}}
{{- define "lawnwatch.overridden" -}}
{{- $text := index . 0 }}
{{- range $key, $_ := index . 1 }}{{ $text = regexReplaceAll (printf "(?m)^- ({name: %s, .*|name: %s\n.*)\n?" $key $key) $text "" }}{{ end -}}
{{ trim $text }}
{{- range $key, $value := index . 1 }}
- {name: {{ $key }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- /* The settings of lawnwatch: API and every step. */}}
{{- define "lawnwatch.env" }}{{ include "lawnwatch.overridden" (list (include "lawnwatch.envOfOurs" .) .Values.env) }}{{ end }}
{{- define "lawnwatch.envOfOurs" -}}
{{- $name := include "lawnwatch.name" . -}}
{{ include "lawnwatch.secretEnv" (list "DATABASE_PASSWORD" (include "lawnwatch.mysqlSecret" .) "lawnwatch-password") }}
{{ include "lawnwatch.secretEnv" (list "LAWNWATCH_STORE_SECRET_KEY" (include "lawnwatch.storeSecret" .) "lawnwatch-secret-key") }}
- {name: LAWNWATCH_ENVIRONMENT, value: {{ .Values.environment | quote }}}
- {name: LAWNWATCH_DATABASE_URL, value: "mysql+pymysql://lawnwatch:$(DATABASE_PASSWORD)@{{ include "lawnwatch.mysqlHost" . }}:{{ .Values.mysql.port }}/lawnwatch{{ include "lawnwatch.mysqlTls" . }}"}
- {name: LAWNWATCH_STORE_URL, value: "s3://{{ .Values.minio.buckets.lawnwatch }}"}
- {name: LAWNWATCH_STORE_ENDPOINT, value: {{ include "lawnwatch.storeEndpoint" . | quote }}}
- {name: LAWNWATCH_STORE_REGION, value: {{ .Values.minio.region | quote }}}
- {name: LAWNWATCH_STORE_ACCESS_KEY, value: {{ .Values.minio.accessKeys.lawnwatch | quote }}}
- {name: MLFLOW_TRACKING_URI, value: "http://{{ $name }}-mlflow:5000"}
- {name: LAWNWATCH_API_URL, value: "http://{{ $name }}-api:8000"}
- {name: LAWNWATCH_ROLLOUT__TARGET, value: kubernetes}
- {name: LAWNWATCH_ROLLOUT__DEPLOYMENT, value: {{ $name }}-api}
- {name: LAWNWATCH_ROLLOUT__NAMESPACE, value: {{ .Release.Namespace | quote }}}
- {name: LAWNWATCH_ROLLOUT__SERVICE_ACCOUNT, value: {{ $name }}-rollout}
- {name: LAWNWATCH_LOG_JSON, value: "true"}
{{- end }}

{{- /* What Airflow's own processes and its task pods share. */}}
{{- define "lawnwatch.taskEnv" }}{{ include "lawnwatch.overridden" (list (include "lawnwatch.taskEnvOfOurs" .) .Values.env) }}{{ end }}
{{- define "lawnwatch.taskEnvOfOurs" -}}
{{- $name := include "lawnwatch.name" . -}}
{{ include "lawnwatch.envOfOurs" . }}
- {name: LAWNWATCH_WEIGHTS, value: {{ .Values.weights | quote }}}
- {name: LAWNWATCH_PUBLIC_URL, value: {{ include "lawnwatch.publicUrl" . | quote }}}
{{- include "lawnwatch.apiKeyEnv" . }}
- {name: LAWNWATCH_STEP_RESOURCES, value: {{ .Values.airflow.steps | toJson | quote }}}
- {name: MLFLOW_HTTP_REQUEST_MAX_RETRIES, value: "4"}
- {name: MLFLOW_HTTP_REQUEST_TIMEOUT, value: "30"}
{{ include "lawnwatch.secretEnv" (list "AIRFLOW_STORE_SECRET_KEY" (include "lawnwatch.storeSecret" .) "airflow-secret-key") }}
{{ include "lawnwatch.secretEnv" (list "AIRFLOW__CORE__FERNET_KEY" (include "lawnwatch.airflowSecret" .) "fernet-key") }}
- {name: AIRFLOW__CORE__EXECUTOR, value: KubernetesExecutor}
- {name: AIRFLOW__CORE__EXECUTION_API_SERVER_URL, value: "http://{{ $name }}-airflow-api:8080/execution/"}
- {name: AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION, value: "false"}
- {name: AIRFLOW__CORE__PARALLELISM, value: {{ .Values.airflow.parallelism | quote }}}
- {name: AIRFLOW__LOGGING__REMOTE_LOGGING, value: "true"}
- {name: AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER, value: "s3://{{ .Values.minio.buckets.airflow }}/logs"}
- {name: AIRFLOW__LOGGING__REMOTE_LOG_CONN_ID, value: lawnwatch_logs}
- name: AIRFLOW_CONN_LAWNWATCH_LOGS
  value: '{"conn_type": "aws", "login": {{ .Values.minio.accessKeys.airflow | quote }}, "password": "$(AIRFLOW_STORE_SECRET_KEY)", "extra": {"endpoint_url": {{ include "lawnwatch.storeEndpoint" . | quote }}, "region_name": {{ .Values.minio.region | quote }}}}'
{{- end }}

{{- /* Airflow's own processes: they alone reach its database and know its keys. */}}
{{- define "lawnwatch.airflowEnv" }}{{ include "lawnwatch.overridden" (list (include "lawnwatch.airflowEnvOfOurs" .) .Values.airflow.env) }}{{ end }}
{{- define "lawnwatch.airflowEnvOfOurs" -}}
{{- $name := include "lawnwatch.name" . -}}
{{ include "lawnwatch.taskEnv" . }}
{{ include "lawnwatch.secretEnv" (list "AIRFLOW_DATABASE_PASSWORD" (include "lawnwatch.mysqlSecret" .) "airflow-password") }}
{{ include "lawnwatch.secretEnv" (list "AIRFLOW__API__SECRET_KEY" (include "lawnwatch.airflowSecret" .) "api-secret-key") }}
{{ include "lawnwatch.secretEnv" (list "AIRFLOW__API_AUTH__JWT_SECRET" (include "lawnwatch.airflowSecret" .) "jwt-secret") }}
- {name: AIRFLOW__DATABASE__SQL_ALCHEMY_CONN, value: "mysql+mysqldb://airflow:$(AIRFLOW_DATABASE_PASSWORD)@{{ include "lawnwatch.mysqlHost" . }}:{{ .Values.mysql.port }}/airflow{{ include "lawnwatch.mysqlTls" . }}{{ if .Values.mysql.caSecret }}&ssl_mode=VERIFY_IDENTITY{{ end }}"}
- {name: AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC, value: "mysql+aiomysql://airflow:$(AIRFLOW_DATABASE_PASSWORD)@{{ include "lawnwatch.mysqlHost" . }}:{{ .Values.mysql.port }}/airflow"}
{{- if .Values.mysql.caSecret }}
- {name: AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS_ASYNC, value: lawnwatch.airflow_tls.connect_args}
{{- end }}
- {name: AIRFLOW__API__WORKERS, value: {{ .Values.airflow.workers | quote }}}
- {name: AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS, value: "admin:admin"}
- {name: AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE, value: /opt/airflow/passwords.json}
- {name: AIRFLOW__KUBERNETES_EXECUTOR__NAMESPACE, value: {{ .Release.Namespace | quote }}}
- {name: AIRFLOW__KUBERNETES_EXECUTOR__POD_TEMPLATE_FILE, value: /etc/lawnwatch/pod.yaml}
- {name: AIRFLOW__KUBERNETES_EXECUTOR__DELETE_WORKER_PODS_ON_FAILURE, value: "true"}
- {name: AIRFLOW__KUBERNETES_EXECUTOR__WORKER_PODS_CREATION_BATCH_SIZE, value: "4"}
- {name: AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT, value: "120"}
{{- end }}

{{- define "lawnwatch.writableMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/lawnwatch}
- {name: airflow, mountPath: /opt/airflow}
{{- include "lawnwatch.mysqlCaMount" . }}
{{- end }}

{{- define "lawnwatch.writableVolumes" -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
- {name: airflow, emptyDir: {}}
{{- include "lawnwatch.mysqlCaVolume" . }}
{{- end }}

{{- /* The passwords of each part, as JSON. Those of root are for the servers that the chart brings. */}}
{{- define "lawnwatch.passwords" -}}
{{- dict
  "mysql" (concat (.Values.mysql.enabled | ternary (list "root-password") list) (list "lawnwatch-password" "airflow-password" "mlflow-password"))
  "store" (concat (.Values.minio.enabled | ternary (list "root-user" "root-password") list) (list "lawnwatch-secret-key" "airflow-secret-key" "mlflow-secret-key"))
  "airflow" (list "fernet-key" "api-secret-key" "jwt-secret" "admin-password") | toJson }}
{{- end }}

{{- /* The Secrets that are made here, with their keys, as JSON; one that a value names is somebody else's. */}}
{{- define "lawnwatch.secretKeys" -}}
{{- $made := dict }}
{{- range $part, $keys := include "lawnwatch.passwords" . | fromJson }}
{{- if not (index $.Values.secrets $part) }}{{ $_ := set $made (printf "%s-%s" (include "lawnwatch.name" $) $part) $keys }}{{ end }}
{{- end }}
{{- toJson $made }}
{{- end }}

{{- /* What a Secret holds, as JSON: what the cluster has, and what is made here; made once for all who ask. (list $ name) */}}
{{- define "lawnwatch.secretData" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $known := get $root "secretData" | default dict }}
{{- if not (hasKey $known $name) }}
{{- $data := (lookup "v1" "Secret" $root.Release.Namespace $name).data | default dict }}
{{- if eq $root.Values.secrets.create "chart" }}
{{- range get (include "lawnwatch.secretKeys" $root | fromJson) $name | default list }}
{{- $new := randAlphaNum 32 }}
{{- if eq . "fernet-key" }}{{ $new = randBytes 32 | replace "+" "-" | replace "/" "_" }}{{ end }}
{{- if not (hasKey $data .) }}{{ $_ := set $data . ($new | b64enc) }}{{ end }}
{{- end }}
{{- end }}
{{- $_ := set $root "secretData" (set $known $name $data) }}
{{- end }}
{{- get (get $root "secretData") $name | toJson }}
{{- end }}

{{- /* Ends Helm before a pod starts with a password that is as good as none, or that a server of somebody else's never heard of.
What renders without a cluster sees no Secret. */}}
{{- define "lawnwatch.refusePasswords" -}}
{{- $outside := dict "mysql" (.Values.mysql.enabled | ternary "" "mysql") "store" (.Values.minio.enabled | ternary "" "minio") }}
{{- $known := list "" "admin" "changeme" "changethis" "change-me" "default" "minioadmin" "password" "root" "secret" "test" }}
{{- range $part, $keys := include "lawnwatch.passwords" . | fromJson }}
{{- if not (index $.Values.secrets $part) }}
{{- if get $outside $part }}
{{- fail (printf "secrets.%s is empty: with %s.enabled=false it names the Secret with the passwords that its users have, under the keys %s; none can be made up here" $part (get $outside $part) (join ", " $keys)) }}
{{- else if eq $.Values.secrets.create "none" }}
{{- fail (printf "secrets.%s is empty: with secrets.create=none it names the Secret with the keys %s; or let the chart make one with secrets.create=chart" $part (join ", " $keys)) }}
{{- end }}
{{- end }}
{{- $name := include (printf "lawnwatch.%sSecret" $part) $ }}
{{- range $key, $value := include "lawnwatch.secretData" (list $ $name) | fromJson }}
{{- if and (has $key $keys) (ne $key "root-user") (has ($value | b64dec | trim | lower) $known) }}
{{- fail (printf "Secret %s: %s is blank or well-known; choose one of your own" $name $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
