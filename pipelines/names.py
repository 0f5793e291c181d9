"""Names as Kubernetes takes them: what it refuses is found before a pod is made, which may be hours into a run."""

from typing import Annotated

from pydantic import Field

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
NAME = f"^{_SUBDOMAIN}$"
"""Regular expression of an object's name."""
LONGEST_NAME = 253
"""Characters of the longest."""
HIGHEST_ID = 2**31 - 1
"""Highest number of a user or a group that Kubernetes takes."""
LONGEST_S = 2**31 - 1
"""Seconds that Argo and Kubernetes can count."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Label of a pod, or a TrainJob, that waits in a queue of Kueue."""
QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Label that names its WorkloadPriorityClass there."""
SHORT_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""Regular expression of a volume's name, and of one that is a label's value, too."""
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"
"""Regular expression of a label's value."""
LABEL_KEY = rf"^({_SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
"""Regular expression of the name of a label or an annotation."""
OWN_LABEL = r"^(app\.kubernetes\.io/(name|instance|component)|finemill/.*)$"
"""Regular expression of the labels that steps have already, and network policies look for."""
RESOURCE = rf"^{_SUBDOMAIN}/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
"""Regular expression of an extended resource's name."""
VARIABLE = r"^[-._A-Za-z][-._A-Za-z0-9]*$"
"""Regular expression of an environment variable's name."""
FILE_KEY = r"^[-._A-Za-z0-9]*[-_A-Za-z0-9][-._A-Za-z0-9]*$"
"""Regular expression of a key of a ConfigMap or a Secret."""
MOUNT_PATH = r"^(/([^/:.]|\.[^/:.]|\.\.[^/:])[^/:]*)+$"
"""Regular expression of a folder in a container that something is mounted at."""
IMAGE_PATHS = (
    *("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/opt/finemill", "/proc", "/sbin", "/sys", "/usr"),
    *("/usr/bin", "/usr/lib", "/usr/local", "/usr/local/bin", "/usr/local/lib"),
)
"""Folders without which a container of the images does not start."""
ARGO_PATH, ARGO_VOLUME = "/var/run/argo", "var-run-argo"
"""What Argo's executor mounts in every container, and where."""
PASSWORD = r"//[^/@\s]*:[^/@\s]+@"
"""Regular expression of a password in an address."""
REPOSITORY = r"^([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+(([._]|__|-+|/)[a-z0-9]+)*$"
"""Regular expression of an image's name without tag and digest."""
TAG = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"
"""Regular expression of an image's tag."""
IMAGE = rf"{REPOSITORY[:-1]}(:{TAG[1:-1]})?(@sha256:[0-9a-f]{{64}})?$"
"""Regular expression of an image."""

Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)]
"""Type of an object's name."""
ShortName = Annotated[str, Field(pattern=SHORT_NAME)]
"""Type of a name that is a label's value, too."""
Image = Annotated[str, Field(pattern=IMAGE)]
"""Type of an image's name."""
Variable = Annotated[str, Field(pattern=VARIABLE)]
"""Type of an environment variable's name."""
MountPath = Annotated[str, Field(pattern=MOUNT_PATH)]
"""Type of a folder in a container that something is mounted at."""
LabelKey = Annotated[str, Field(pattern=LABEL_KEY)]
"""Type of the name of a label or an annotation."""
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]
"""Type of a label's value."""
FileKey = Annotated[str, Field(pattern=FILE_KEY)]
"""Type of a key of a ConfigMap or a Secret."""
