{{/* The release's name, which is what everything but the pipelines is called. */}}
{{- define "finemill.fullname" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "finemill.labels" -}}
app.kubernetes.io/name: finemill
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "finemill.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "finemill.fullname" .) -}}
{{- end }}

{{/* An image's full name: dict "root" $ "role" "cpu" or "train". */}}
{{- define "finemill.image" -}}
{{- $image := index .root.Values.images .role -}}
{{- $prefix := ternary (printf "%s/" .root.Values.images.registry) "" (ne .root.Values.images.registry "") -}}
{{- if $image.digest -}}
{{- printf "%s%s@%s" $prefix $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s%s:%s" $prefix $image.repository ($image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{/* A step's container template, given dict "root" $ "step" the template: YAML of the same with the release's values. */}}
{{- define "finemill.step" -}}
{{- $values := .root.Values -}}
{{- $step := .step -}}
{{- $labels := $step.metadata.labels -}}
{{- $size := index $values.resources (index $labels "finemill/size") -}}
{{- $quantities := dict "cpu" $size.cpu "memory" $size.memory -}}
{{- $container := $step.container -}}
{{- $_ := set $container "image" (include "finemill.image" (dict "root" .root "role" (index $labels "finemill/image"))) -}}
{{- range $variable := $container.env -}}
{{- if eq $variable.name "FINEMILL_IMAGE" -}}
{{- $_ := set $variable "value" $container.image -}}
{{- end -}}
{{- end -}}
{{- $_ := set $container "imagePullPolicy" $values.images.pullPolicy -}}
{{- $_ := set $container "resources" (dict "requests" $quantities "limits" $quantities) -}}
{{- $sources := list (dict "configMapRef" (dict "name" (include "finemill.fullname" .root))) -}}
{{- range list $values.s3.existingSecret $values.mlflow.existingSecret $values.hub.existingSecret -}}
{{- if . -}}
{{- $sources = append $sources (dict "secretRef" (dict "name" .)) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $container "envFrom" $sources -}}
{{- $_ := set $labels "app.kubernetes.io/instance" .root.Release.Name -}}
{{- $patch := dict "terminationGracePeriodSeconds" $values.workflow.terminationGracePeriodSeconds -}}
{{- if eq (index $labels "finemill/size") "gpu" -}}
{{- $limits := dict $values.gpu.resource "{{workflow.parameters.gpus}}" -}}
{{- $_ := set $patch "containers" (list (dict "name" "main" "resources" (dict "limits" $limits))) -}}
{{- $_ := set $step "nodeSelector" $values.gpu.nodeSelector -}}
{{- $_ := set $step "tolerations" $values.gpu.tolerations -}}
{{- if $values.gpu.queue -}}
{{- $_ := set $labels "kueue.x-k8s.io/queue-name" $values.gpu.queue -}}
{{- end -}}
{{- end -}}
{{- $_ := set $step "podSpecPatch" (toJson $patch) -}}
{{- toYaml $step -}}
{{- end }}

{{/* The value of a pipeline's parameter: dict "root" $ "parameter" the entry of the pipeline's own arguments. */}}
{{- define "finemill.parameter" -}}
{{- $values := .root.Values -}}
{{- $name := .parameter.name -}}
{{- if eq $name "store" -}}
{{- $values.store -}}
{{- else if eq $name "gpus" -}}
{{- $values.gpu.count -}}
{{- else if hasKey $values.config $name -}}
{{- $value := index $values.config $name -}}
{{- if kindIs "map" $value }}{{ toJson $value }}{{ else }}{{ $value }}{{ end -}}
{{- else if and (eq $name "preflight") $values.gpu.memoryGiB -}}
{{- toJson (dict "gpu_memory_gib" $values.gpu.memoryGiB) -}}
{{- else if hasKey .parameter "value" -}}
{{- .parameter.value -}}
{{- end -}}
{{- end }}
