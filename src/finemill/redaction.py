"""Secrets in a text that are known by their form alone: where they stand, what stands before them, how they begin.

Passwords of addresses, options, headers and settings, paths of webhooks, keys of well-known services. The texts are for
people: a word too many costs little, but what finemill itself says (`bad password: check it`) stays whole.
"""

import re
from collections.abc import Iterator

_QUOTED = r"""(?:'[^']*'|"[^"]*"|[^\s'",;]+)"""
_NAMES = (
    r"pass(?:word|wd|phrase)?|pwd|secret|token|jwt|auth|credential|"
    r"(?:api|access|account|auth|client|private|secret|shared|signing|encryption|fernet|subscription)[_-]?key|client[_-]?secret"
)
_ONLY_SECRETS = (
    r"pass(?:word|wd|phrase)|\bpwd|secret(?:[_-]?access)?[_-]?key|client[_-]?secret|shared[_-]?access[_-]?key|"
    r"(?:fernet|encryption|signing|subscription)[_-]?key|(?:auth|access|refresh|session|bearer|private|security|deploy)[_-]?token"
)
_OTHER_SECRETS = r"token|secret|jwt|cookie|session|sid|signature|(?:api|access|account|secret)[_-]?key"
"""Names that other things have, too."""
_NO_VALUE = (
    r"(?:is|are|was|has|had|holds?|must|needs?|takes?|and|or|for|of|in|on|to|from|with|without|the|an?|as|at|by|if|"
    r"not|no|cannot|can|may|will|when|where|that|which|option|given|missing)\b"
)
"""Pattern of the words that follow an option's name in a sentence."""
_SCHEMES = (
    r"(?:bearer|basic|token|bot|key|api-?key|negotiate|ntlm|kerberos|jwt|hmac|aws|sharedkey(?:lite)?|splunk|ssws|"
    r"geniekey|googlelogin|oauth2?|dpop|vapid|hawk|digest|aws4-[\w-]+)"
)
_SPACE = r"(?:\s+|%20|\+)"
_QUERY_NAMES = (
    r"sig|signature|token|secret|password|passwd|pwd|pass|auth|key|accesskeyid|credential|jwt|session(?:id)?|sid|"
    r"ticket|assertion|otp"
)
_SERVICE_KEYS = (
    r"sk-(?:[a-z]+-)?\w{16,}",
    r"(?:sk|rk|pk)_(?:live|test)_\w{16,}",
    r"hf_[A-Za-z0-9]{20,}",
    r"gh[pousr]_\w{20,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"xox[abeoprs]-[\w-]{10,}",
    r"xapp-[\w-]{10,}",
    r"dapi[0-9a-f]{32}",
    r"AIza[\w-]{30,}",
    r"ya29\.[\w-]{20,}",
    r"GOCSPX-[\w-]{20,}",
    r"(?:npm|dckr_pat|pypi|nvapi|gsk|whsec|hvs|r8)[_.-](?=[\w-]*\d)[\w-]{20,}",
    r"SG\.[\w-]{16,}\.[\w-]{16,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}[:\s,;'\"]{1,4}[\w/+=]{40}",
    r"eyJ[\w-]{5,}\.[\w-]+\.[\w-]*",
)


def _patterns() -> Iterator[str]:
    """What is cut out, each behind a first group that stays."""
    # `user:password@` in a URI; the password may hold `/` and `@`, where what follows the colon is no port.
    yield r"((?<=://))(?:[^/\s@]{0,999}+@(?:[^/\s]{0,99}@)?|[^/\s@:]{1,99}+:(?!\d+/)[^\s@]{0,999}+@)"
    # The same without a scheme, where a host follows; an image's `name:tag@sha256:` is none.
    yield r"((?<![\w/:.@-])(?://)?)[\w.+-]+:[^\s/@:'\"]+@(?!sha\d+:)(?=[\w-]+(?:\.\w|:\d|/))"
    yield rf"([?&;#][\w.%-]*(?:{_QUERY_NAMES})=)[^&;\s'\"<>]+"
    yield rf"((?:%3F|%26)[\w.-]*(?:{_QUERY_NAMES})%3D)(?:(?!%26)[^&;\s'\"<>])+"
    yield r"([?&]code=)(?!\d{1,5}(?:[&\s'\"]|$))[^&;\s'\"<>]+"
    # A webhook's path is its password.
    yield r"(https?://[^\s'\"<>?]{1,200}?/(?:(?:\w*hooks?|webhook\w*|integrations?|IncomingWebhook|with/key)/|services/(?=T)|bot(?=\d+:)))[^\s'\"<>?]+"
    yield (
        rf"(authorization(?:\]|['\"])*\s*(?:[:=,]|%3A)(?:\s|%20)*[\[(]?(?:b?['\"])?(?:{_SCHEMES}{_SPACE})?)"
        r"(?:\w+=(?:\"[^\"]*\"|[^\s,'\"]+)(?:,\s*\w+=(?:\"[^\"]*\"|[^\s,'\"]+))+|[^\s'\",;]+)"
    )
    yield r"(\b(?:bearer|basic)\s+)(?=\S*[\d=])[\w.~+/=-]{16,}"
    yield r"((?:Invalid|Illegal) header value )b?(?:'[^']*'|\"[^\"]*\")"
    yield r"(set-cookie['\"]?\s*:\s*['\"]?[\w.-]+=)[^\s;'\"]+"
    yield r"((?<!set-)\bcookie['\"]?\s*:\s*['\"]?)[\w.-]+=[^\s;'\"]+(?:;\s*[\w.-]+=[^\s;'\"]+)*"
    yield (
        r"(\b(?:x-[\w-]*(?:key|token|secret|signature|password)|(?:private|job|deploy)-token)['\"]?\s*:\s*['\"]?)"
        r"[^\s'\",;]+"
    )
    # Options of commands, also in a list of Python's.
    yield rf"((?<![\w-])--?[\w-]*(?:{_NAMES})['\"]?,?(?:\s+|=))(?!-|{_NO_VALUE}){_QUOTED}"
    yield r"((?<!\S)(?:-u|--user)\s+)['\"]?[^\s:'\"/-][^\s:'\"/]*:[^\s'\"]+"
    yield r"(\blogin\s(?:[^|;]{0,80}?\s)?-p\s*)[^\s-]\S*"
    yield r"(\b(?:mysql\w*|mariadb[\w-]*)\s(?:[^|;]{0,80}?\s)?-p)(?=\S)(?!assword)\S+"
    yield r"(\bmachine\s+\S+\s+login\s+\S+\s+password\s+)\S+"
    # Settings: what is only ever a secret, then names that other things have, too, before what looks like a key.
    yield (
        rf"((?:{_ONLY_SECRETS})"
        r"(?:['\"]?(?:\s*=\s*|%3D)['\"]?|['\"]\s*:\s*['\"]?|:(?=\S)))[^\s'\",;&/][^\s'\",;&]*"
    )
    yield rf"((?:{_ONLY_SECRETS})['\"]?:\s+['\"]?)(?=[^\s'\",;&]*\d)[^\s'\",;&]{{6,}}"
    yield (
        rf"((?:{_OTHER_SECRETS})"
        r"['\"]?\s*[:=]\s*['\"]?(?:\w+=)?)(?=[^\s\d'\",;&]{0,99}+\d)(?=[^\sA-Za-z'\",;&]{0,99}+[A-Za-z])[\w+/.~=-]{12,}"
    )
    yield rf"(<\w*(?:{_NAMES})>)[^<]+(?=</)"
    yield r"([\"']auth[\"']\s*:\s*[\"'])[\w+/=]{12,}"
    yield r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)"


_COMPILED = tuple(re.compile(pattern, re.IGNORECASE | re.DOTALL) for pattern in _patterns())
_KEYS = re.compile(rf"(?<![\w-])(?:{'|'.join(_SERVICE_KEYS)})")


def without_secret_forms(text: str) -> str:
    """The text without what stands where secrets stand, and without what begins as one."""
    user, bare_user, *others = _COMPILED
    text = bare_user.sub(r"\1", user.sub(r"\1", text))
    for pattern in others:
        text = pattern.sub(r"\1***", text)
    return _KEYS.sub("***", text)
