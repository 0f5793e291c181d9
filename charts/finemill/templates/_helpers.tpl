{{/* The release's name, which is what everything but the pipelines is called. */}}
{{- define "finemill.fullname" -}}
{{- regexReplaceAll "[^a-z0-9]+$" (.Release.Name | trunc 50) "" -}}
{{- end }}

{{- define "finemill.labels" -}}
app.kubernetes.io/name: finemill
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{- end }}

{{- define "finemill.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "finemill.fullname" .) -}}
{{- end }}

{{/* An image's full name: dict "root" $ "role" "cpu" or "train". */}}
{{- define "finemill.image" -}}
{{- $image := index .root.Values.images .role -}}
{{- $repository := required (printf "images.%s.repository names no image" .role) $image.repository -}}
{{- $prefix := ternary (printf "%s/" .root.Values.images.registry) "" (ne .root.Values.images.registry "") -}}
{{- if $image.digest -}}
{{- printf "%s%s@%s" $prefix $repository $image.digest -}}
{{- else -}}
{{- printf "%s%s:%s" $prefix $repository ($image.tag | default (.root.Chart.AppVersion | replace "+" "_")) -}}
{{- end -}}
{{- end }}

{{/* Variables of a container, dict "root" $ "own" those of the pipelines: YAML of a list in which the values' own win. */}}
{{- define "finemill.env" -}}
{{- $given := .root.Values.extraEnv | default list -}}
{{- $names := list -}}
{{- range $given -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $variables := list -}}
{{- range concat .own (include "finemill.certificates" .root | fromYamlArray) -}}
{{- if not (has .name $names) -}}
{{- $variables = append $variables . -}}
{{- end -}}
{{- end -}}
{{- toYaml (concat $variables $given) -}}
{{- end }}

{{/* Variables that name the file of certificates: YAML of a list. */}}
{{- define "finemill.certificates" -}}
{{- $variables := list -}}
{{- if .Values.caBundle.configMap -}}
{{- $file := printf "/etc/finemill/ca/%s" .Values.caBundle.key -}}
{{- range list "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" "SSL_CERT_FILE" -}}
{{- $variables = append $variables (dict "name" . "value" $file) -}}
{{- end -}}
{{- end -}}
{{- toYaml $variables -}}
{{- end }}

{{/* Volumes of every step's pod besides those of the pipelines: YAML of a list. */}}
{{- define "finemill.volumes" -}}
{{- $volumes := .Values.extraVolumes | default list -}}
{{- if .Values.caBundle.configMap -}}
{{- $volumes = append $volumes (dict "name" "ca-bundle" "configMap" (dict "name" .Values.caBundle.configMap)) -}}
{{- end -}}
{{- toYaml $volumes -}}
{{- end }}

{{/* Where they are mounted: YAML of a list. */}}
{{- define "finemill.volumeMounts" -}}
{{- $mounts := .Values.extraVolumeMounts | default list -}}
{{- $volumes := list "tmp" "cache" -}}
{{- range .Values.extraVolumes -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- range $mounts -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "extraVolumeMounts: there is no volume '%s' in extraVolumes" .name) -}}
{{- end -}}
{{- end -}}
{{- if .Values.caBundle.configMap -}}
{{- $mounts = append $mounts (dict "name" "ca-bundle" "mountPath" "/etc/finemill/ca" "readOnly" true) -}}
{{- end -}}
{{- toYaml $mounts -}}
{{- end }}

{{/* Who the pods run as: YAML. A cache has many files, whose group is set once and not at each start. */}}
{{- define "finemill.podSecurity" -}}
{{- $security := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- $given := .Values.podSecurityContext | default dict -}}
{{- if hasKey $given "fsGroup" -}}
{{- $_ := set $security "fsGroupChangePolicy" "OnRootMismatch" -}}
{{- end -}}
{{- toYaml (merge $security $given) -}}
{{- end }}

{{/* Requests and limits of a container, given its size: YAML. */}}
{{- define "finemill.quantities" -}}
{{- $quantities := dict "cpu" (toString .cpu) "memory" (toString .memory) -}}
{{- if .ephemeralStorage -}}
{{- $_ := set $quantities "ephemeral-storage" (toString .ephemeralStorage) -}}
{{- end -}}
{{- toYaml $quantities -}}
{{- end }}

{{/* The port of a URL: its own, or its scheme's. Nothing for an empty text, and for a file. */}}
{{- define "finemill.port" -}}
{{- if not (regexMatch "^$|^(file|sqlite):" .) -}}
{{- $url := urlParse . -}}
{{- $own := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $known := dict "http" "80" "postgresql" "5432" "mysql" "3306" "mssql" "1433" "socks5" "1080" "socks5h" "1080" -}}
{{- $own | default (get $known (regexFind "^[^+]*" $url.scheme)) | default "443" -}}
{{- end -}}
{{- end }}

{{/* Addresses that the values name: YAML of a list. */}}
{{- define "finemill.addresses" -}}
{{- $found := list .Values.s3.endpointUrl .Values.mlflow.trackingUri .Values.hub.endpoint -}}
{{- range .Values.extraEnv -}}
{{- if .value -}}
{{- if contains "://" .value -}}
{{- $found = append $found .value -}}
{{- else if regexMatch "(?i)^(https?|all)_proxy$" .name -}}
{{- $found = append $found (printf "http://%s" .value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (concat $found (regexFindAll "https?://[^\"\\\\\\s]+" (toJson .Values.config) -1)) -}}
{{- end }}

{{/* What the schema of the values cannot tell; ends the rendering. */}}
{{- define "finemill.check" -}}
{{- range list "images" "s3" "mlflow" "hub" "resources" "caBundle" "gpu" "cache" "workflow" "schedule" "serviceAccount" "rbac" "networkPolicy" "trainingRuntime" -}}
{{- if not (kindIs "map" (get $.Values .)) -}}
{{- fail (printf "%s: null is no section; leave it out for its defaults" .) -}}
{{- end -}}
{{- end -}}
{{- range $section, $names := dict "images" (list "cpu" "train") "resources" (list "small" "large" "gpu") -}}
{{- range $names -}}
{{- if not (kindIs "map" (get (get $.Values $section) .)) -}}
{{- fail (printf "%s.%s: null is no section; leave it out for its defaults" $section .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "finemill.checkTwice" (dict "what" "extraEnv" "key" "name" "items" .Values.extraEnv) -}}
{{- include "finemill.checkTwice" (dict "what" "extraVolumes" "key" "name" "items" .Values.extraVolumes) -}}
{{- include "finemill.checkTwice" (dict "what" "extraVolumeMounts" "key" "mountPath" "items" .Values.extraVolumeMounts) -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: name the one to use in serviceAccount.name" -}}
{{- end -}}
{{- with include "finemill.hostGiB" . -}}
{{- if le (float64 .) 0.0 -}}
{{- fail "gpu.sharedMemory counts into resources.gpu.memory: give less of the one, or more of the other" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gpu.queuePriority (not .Values.gpu.queue) -}}
{{- fail "gpu.queuePriority is about the pods of a queue: name it in gpu.queue" -}}
{{- end -}}
{{- if .Values.schedule.enabled -}}
{{- include "finemill.checkCron" .Values.schedule.cron -}}
{{- end -}}
{{- end }}

{{/* Fails if two items have the same name or path: dict "what" the value "key" "items". */}}
{{- define "finemill.checkTwice" -}}
{{- $seen := list -}}
{{- range .items -}}
{{- $own := get . $.key -}}
{{- if has $own $seen -}}
{{- fail (printf "%s: '%s' is there twice" $.what $own) -}}
{{- end -}}
{{- $seen = append $seen $own -}}
{{- end -}}
{{- end }}

{{/* Fails for five fields that Argo's controller refuses for ever, or that never come. */}}
{{- define "finemill.checkCron" -}}
{{- $cron := upper . -}}
{{- range $number, $name := list "JAN" "FEB" "MAR" "APR" "MAY" "JUN" "JUL" "AUG" "SEP" "OCT" "NOV" "DEC" -}}
{{- $cron = $cron | replace $name (toString (add1 $number)) -}}
{{- end -}}
{{- range $number, $name := list "SUN" "MON" "TUE" "WED" "THU" "FRI" "SAT" -}}
{{- $cron = $cron | replace $name (toString $number) -}}
{{- end -}}
{{- range regexFindAll "[0-9]+-[0-9]+" $cron -1 -}}
{{- $ends := splitList "-" . -}}
{{- if gt (atoi (first $ends)) (atoi (last $ends)) -}}
{{- fail (printf "schedule.cron: '%s' falls: write the smaller number first" .) -}}
{{- end -}}
{{- end -}}
{{- if regexMatch "^\\S+ +\\S+ +((0*3[01][,-]?)+ +(0*2,?)+|(0*31,?)+ +(0*(2|4|6|9|11),?)+) +[*?]$" $cron -}}
{{- fail (printf "schedule.cron: '%s' names a day that its months do not have" .) -}}
{{- end -}}
{{- end }}

{{/* What a run's parameters decide of a GPU step's requests and limits, dict "root" $ "step" the template: YAML. A step
of several nodes has a TrainJob compute, and needs little itself. */}}
{{- define "finemill.gpuResources" -}}
{{- $values := .root.Values -}}
{{- $limits := dict $values.gpu.resource "{{workflow.parameters.gpus}}" -}}
{{- $resources := dict "limits" $limits -}}
{{- $follows := regexFind "[(]fromJSON[^?]*[?][?] 1[)] != 1" .step.podSpecPatch -}}
{{- if $follows -}}
{{- $_ := set $limits $values.gpu.resource (printf "{{=%s ? '0' : workflow.parameters.gpus}}" $follows) -}}
{{- $requests := dict -}}
{{- $small := include "finemill.quantities" $values.resources.small | fromYaml -}}
{{- range $name, $quantity := include "finemill.quantities" $values.resources.gpu | fromYaml -}}
{{- if hasKey $small $name -}}
{{- $either := printf "{{=%s ? '%s' : '%s'}}" $follows (index $small $name) $quantity -}}
{{- $_ := set $limits $name $either -}}
{{- $_ := set $requests $name $either -}}
{{- end -}}
{{- end -}}
{{- $_ := set $resources "requests" $requests -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* A step's container template, given dict "root" $ "step" the template: YAML of the same with the release's values. */}}
{{- define "finemill.step" -}}
{{- $values := .root.Values -}}
{{- $step := .step -}}
{{- $labels := $step.metadata.labels -}}
{{- $size := index $values.resources (index $labels "finemill/size") -}}
{{- $quantities := include "finemill.quantities" $size | fromYaml -}}
{{- $container := $step.container -}}
{{- $_ := set $container "image" (include "finemill.image" (dict "root" .root "role" (index $labels "finemill/image"))) -}}
{{- range $variable := $container.env -}}
{{- if eq $variable.name "FINEMILL_IMAGE" -}}
{{- $_ := set $variable "value" $container.image -}}
{{- end -}}
{{- end -}}
{{- $_ := set $container "env" (include "finemill.env" (dict "root" .root "own" $container.env) | fromYamlArray) -}}
{{- $_ := set $container "volumeMounts" (concat $container.volumeMounts (include "finemill.volumeMounts" .root | fromYamlArray)) -}}
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
{{- $_ := set $patch "containers" (list (dict "name" "main" "resources" (include "finemill.gpuResources" . | fromYaml))) -}}
{{- $_ := set $step "nodeSelector" (merge dict ($values.gpu.nodeSelector | default dict) ($values.nodeSelector | default dict)) -}}
{{- $_ := set $step "tolerations" (concat ($values.gpu.tolerations | default list) ($values.tolerations | default list)) -}}
{{- if $values.gpu.queue -}}
{{- $_ := set $labels "kueue.x-k8s.io/queue-name" $values.gpu.queue -}}
{{- with $values.gpu.queuePriority -}}
{{- $_ := set $labels "kueue.x-k8s.io/priority-class" . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $_ := set $step "podSpecPatch" (toJson $patch) -}}
{{- toYaml $step -}}
{{- end }}

{{/* GiB of a GPU step's memory beside its shared memory, where both are given in Gi; else nothing. */}}
{{- define "finemill.hostGiB" -}}
{{- $whole := toString .Values.resources.gpu.memory -}}
{{- $shared := toString .Values.gpu.sharedMemory -}}
{{- if and (regexMatch "^[0-9.]+Gi$" $whole) (regexMatch "^[0-9.]+Gi$" $shared) -}}
{{- subf (trimSuffix "Gi" $whole) (trimSuffix "Gi" $shared) -}}
{{- end -}}
{{- end }}

{{/* The value of a pipeline's parameter: dict "root" $ "parameter" the entry of the pipeline's own arguments "trains" whether
one of its steps does. */}}
{{- define "finemill.parameter" -}}
{{- $values := .root.Values -}}
{{- $name := .parameter.name -}}
{{- if eq $name "store" -}}
{{- $values.store -}}
{{- else if eq $name "gpus" -}}
{{- $values.gpu.count -}}
{{- else if hasKey ($values.config | default dict) $name -}}
{{- $value := index $values.config $name -}}
{{- if kindIs "map" $value }}{{ toJson $value | replace "{{" "\\u007b\\u007b" }}{{ else }}{{ $value }}{{ end -}}
{{- else if eq $name "preflight" -}}
{{- $memory := dict -}}
{{- with $values.gpu.memoryGiB -}}
{{- $_ := set $memory "gpu_memory_gib" . -}}
{{- end -}}
{{- $host := include "finemill.hostGiB" .root -}}
{{- if and .trains $host -}}
{{- $_ := set $memory "host_memory_gib" (float64 $host) -}}
{{- end -}}
{{- toJson $memory -}}
{{- else if hasKey .parameter "value" -}}
{{- .parameter.value -}}
{{- end -}}
{{- end }}
