"""Whether a text looks machine-made: the sceptical default for texts that no envelope explains.

The form decides, not the topic. A log, an error or JSON with a person's own words around it is the
person's. Every scan is linear in the text and looks at a limited number of lines.
"""

from __future__ import annotations

import ast
import re

import orjson

from nextstate.records import Source

_TAG = re.compile(r"<([A-Za-z_][\w:.-]{0,60})(?:\s[^<>]{0,500})?/?>")
_FORMATTING = re.compile(
    r"</?(?:[abiuspq]|em|strong|span|br|h[1-6]|del|mark|small|su[bp]|blockquote)\b", re.IGNORECASE
)
_BANNER = re.compile(
    r"\[(?:tool|function|command|system|automated|auto|internal|notification|reminder|scheduled|"
    r"cron|heartbeat|webhook|timer|subagent|background|hook|observation|environment|context)"
    r"(?:[ _:-][^\]\n]{0,200})?\]",
    re.IGNORECASE,
)
_RESULT_BANNER = re.compile(r"\[[^\]\n]{0,200}\b(?:results?|outputs?|response|observation)\b", re.I)
_RESULT_LINE = re.compile(r"\[\w{1,60}[^\n]{0,500}\] Result:")
_RESULT_TAG = re.compile(
    r"<(?:(?:tool|function|execution|command)[_-]?(?:results?|response|outputs?|error)|observation)"
    r"(?:\s[^<>\n]{0,200})?>"
)
_ABOUT_FORM = re.compile(
    r"no (?:valid )?(?:tool|function) calls? (?:was |were )?(?:found|detected|made)\b|"
    r"(?:invalid|malformed) (?:tool|function|json|action)(?: call| format| arguments?)?[:.]|"
    r"your (?:last |previous )?(?:response|output|message|reply) (?:could|was|is|did|does)"
    r"(?: not|n['’]t)\b[^.\n]{0,40}\b(?:parsed|conform|formatted|(?:valid|contain|include|match)\b"
    r"[^.\n]{0,30}\b(?:json|xml|yaml|tool|function|action|command|code block|tags?|format|"
    r"schema))\b|"
    r"(?:you must [^.\n]{1,60}\. )?your (?:last |previous )(?:answer|response|output|reply|message)"
    r" (?:contained|included|had) no (?:valid )?(?:tool|function) calls?\b|"
    r"(?:it (?:seems|looks like|appears)(?: that)? )?you (?:did not|didn['’]t|have not|haven['’]t) "
    r"(?:call|use|make|provide|called|used|made|provided) (?:any|a|exactly one) "
    r"(?:tool|function|action|command)(?: calls?)?\. (?:You must|Please|Every|Make sure|Use)\b|"
    r"(?:error: )?invalid (?:action|move|command|choice)[.!:] "
    r"(?:valid|available|allowed|possible|admissible) (?:actions|moves|commands|choices)\b|"
    r"(?:error: )?(?:i )?(?:failed to|could not|couldn't|cannot|unable to) parse "
    r"(?:your |the |a )?(?:response|output|message|reply|(?:tool|function) calls?|json)\b|"
    r"your (?:last |previous )?(?:answer|completion) (?:could|was|is|did) not (?:be )?(?:a |in )?"
    r"(?:parsed|valid (?:json|xml|yaml)|(?:the )?(?:required|expected|correct) format)\b|"
    r"the (?:answer|response|output)(?: you gave)? (?:is|was) not valid (?:json|xml|yaml)\b|"
    r"previous response had (?:\w{1,20} )?(?:errors|warnings|issues)\b|"
    r"\d{1,4} validation errors? (?:for|in|detected)\b|"
    r"(?:deine|ihre) (?:(?:letzte|vorherige) )?(?:antwort|ausgabe|nachricht) (?:konnte|ist|war) "
    r"(?:nicht|kein)\b[^.\n]{0,60}\b(?:geparst|verarbeitet|gelesen|json)\b|"
    r"(?:votre|ta) (?:dernière |précédente )?(?:réponse|sortie)(?: précédente)? n'(?:a|est) pas\b"
    r"[^.\n]{0,60}\b(?:analysée|interprétée|json)\b|"
    r"(?:tu|su) (?:última )?(?:respuesta|salida)(?: anterior)? no (?:es|se|pudo)\b[^.\n]{0,60}\b"
    r"(?:analizar|procesar|json)\b|"
    r"你的?(?:上一?[次条個个]?|之前的|刚才的)?(?:回复|回答|输出|响应)[^。，\n]{0,12}"
    r"(?:无法(?:被)?解析|解析失败|不是有效的 ?JSON)",
    re.IGNORECASE,
)
"""What harnesses say about a reply that they could not read."""
_ASSESSED = re.compile(
    r"(?:(?:score|reward|grade|rating)\s?[:=]\s?-?\d[\d./%]{0,12}\s{0,2}[-,;|]?\s{0,2}"
    r"(?:feedback|reason(?:ing)?|comments?|explanation)\s?[:=]|"
    r"reward\s?[:=]\s?-?[\d.]{1,12}\s{0,9}(?:\Z|(?<=\n)(?:game over|done|terminated|episode)\b)|"
    r"your (?:submission|solution|code|program|patch) (?:failed|passed) \d{1,6} ?"
    r"(?:of|out of|/) ?\d)",
    re.IGNORECASE,
)
"""How a program rates a reply."""
_REPORT = re.compile(
    r"(?:#{1,4} |\*\*)?(?:"
    r"(?:schema )?(?:validation|schema|pars(?:e|ing)|json|api|https?|network|connection|timeout|"
    r"server|syntax|runtime|type|value|key|attribute|import|assertion)[ _-]?"
    r"(?:errors?|failures?|exceptions?|failed)\b[^\n]{0,80}:|"
    r"(?:event|webhook|alert|notification|trigger)"
    r"(?: (?:received|event|fired|triggered|type|name|payload)){0,2} ?:|(?:in|out) ?\[\d{1,6}\]: |"
    r"\d{1,6} ?(?:of|out of|/) ?\d{1,6} (?:\w{1,20} )?(?:tests?|test cases|checks) "
    r"(?:passed|failed)\b|"
    r"(?:wrong answer|(?:time|memory|output) limit exceeded) on (?:test|case)\b|"
    r"(?:错误|报错|异常|エラー)[:：] ?[a-z_./]{3}|"
    r"(?:tool|function|command|code|execution|shell|terminal|bash|python|action|script|test)"
    r"[ _-]?(?:call )?(?:result|output|response|error|execution)s?\b"
    r"(?:[^\n]{0,80}?:|(?=\**(?: \([^)\n]{1,80}\)| ?>{2,9})?\n))|execution logs?:[ \t]*\n|"
    r"(?:tool|function|command) `[^`\n]{1,100}` (?:was )?(?:executed|ran|called)\b[^\n]{0,40}[.:]|"
    r"(?:tool|code|command|script) (?:ran|run) successfully\. (?:output|result|stdout):|"
    r"(?:the )?(?:tool|function)(?: call)? (?:returned|raised|threw|gave) an? "
    r"(?:error|exception)\b[^\n]{0,40}:|"
    r"(?:here (?:is|are) )?the (?:results?|outputs?) of (?:running |executing |calling )?"
    r"(?:the |your )?(?:tool|function|command|code|script)\b[^\n]{0,80}:[ \t]*\n|"
    r"tests? failed: expected [^\n]{1,200}, (?:but )?(?:got|received|actual)\b|"
    r"(?:FAILED|PASSED|ERROR) [\w./-]{1,200}\.py::\w|"
    r"compil(?:ation|er) (?:errors?|failed)\b[^\n]{0,200}:\d|"
    r"lint errors found\b[^\n]{0,80}:[ \t]*\n|"
    r"(?:web )?search results\b[^\n]{0,100}:[ \t]*\n\s{0,9}(?:\[?1[.)\]]|https?:|[{<])|"
    r"(?:step|turn|iteration) \d{1,6} (?:result|output|observation)s?\b[^\n]{0,40}:|"
    r"step \d{1,6}/\d{1,6}[.:] |linter (?:errors|warnings)\b[^\n]{0,80}:|"
    r"(?:current|new) terminal (?:state|screen|output):|current url: |"
    r"(?:command|tool|function) [\w.-]{1,60} returned:|"
    r"(?:code|command|script) (?:was )?executed\b[^\n]{0,40}[:.]|"
    r"observation\b(?:(?: #?\d{1,6}| \([^)\n]{0,40}\))?\s{0,2}:|(?=\**\n))|"
    r"(?:results?|outputs?) (?:of|from|for) [^\n]{1,80}:[ \t]*\n|"
    r"(?:std(?:out|err)|output|result|return(?:ed)?[ _]?(?:code|value)|exit[ _]?(?:code|status))"
    r"[ \t]*[:=]|"
    r"(?:the )?(?:process|command|script|tool|function|execution)(?: call| `[^`\n]{1,100}`)? "
    r"(?:exited|finished|terminated|returned|completed|failed)"
    r"(?: (?:with|after)\b|[ ]?:|\.[ \n])|"
    r"exit(?:ed)? (?:code|status|with)\b|executed: |command: [^\n]{1,300}\nexit|"
    r"Traceback \(most recent call last\)|"
    r"\$ [a-z./][^\n]{0,300}\n|```(?:output|console|stdout|stderr)\n|```\w{0,20}\n\$ [a-z./]|"
    r"(?:(?:werkzeug|tool|befehls|programm|skript)-?(?:ergebnis|ausgabe)|"
    r"(?:ausgabe|ergebnis) (?:des|der) "
    r"(?:werkzeug|tool|befehl|programm|skript|funktion|ausführung)|"
    r"(?:résultat|sortie|retour) d(?:e l['’]|e la |u |e )"
    r"(?:outil|commande|script|fonction|exécution|programme)|"
    r"(?:resultado|salida|saída) d(?:el|a|o|e la) "
    r"(?:herramienta|comando|script|función|ejecución|ferramenta|função|execução)|"
    r"(?:工具|命令|函数|代码|脚本|程序)(?:调用|执行|运行|返回)?(?:的)?(?:结果|输出)|观察(?:结果)?|"
    r"(?:执行|运行)结果|(?:ツール|コマンド|コード|関数|スクリプト)の?(?:実行|呼び出し)?の?(?:結果|出力)|"
    r"(?:результат|вывод) (?:(?:выполнения|вызова|работы) )?"
    r"(?:инструмента|команды|функции|кода|скрипта|программы))[^\n:：]{0,60}[:：])",
    re.IGNORECASE,
)
_AUTOMATED = re.compile(
    r"(?:this is an? (?:automated|automatic|system)[ -](?:\w{1,20} ){0,2}(?:message|reminder|"
    r"notice|notification|follow|prompt|check|event|update|request|response|reply)|"
    r"automated (?:message|reminder|follow-?up)\b|you have \d{1,6} (?:steps?|turns?|iterations?|"
    r"attempts?|tool calls?) (?:left|remaining)\b(?![^.\n]{0,80}\b(?:i|i'm|i'll|we)\b)|"
    r"(?:iteration|step|turn|round) \d{1,6}/\d{1,6}[.:] (?:continue|proceed)\b[^\w\n]{0,9}\Z|"
    r"\[(?:the )?user (?:cancelled|canceled|interrupted|aborted|rejected|denied)[^\]\n]{0,80}\]\Z|"
    r"(?:warning: )?you have used \d{1,6}(?:%| (?:of|out of) \d{1,6}) (?:(?:of )?(?:your|the) )?"
    r"(?:context|tokens?|steps|turns|iterations|tool calls)\b|"
    r"(?:\[[^\]\n]{1,40}\] )?scheduled (?:task|job) (?:fired|triggered|started)\b|"
    r"system (?:message|notification|reminder|note)\s*:|"
    r"(?:remember|don't forget) to (?:update|use|maintain|check) (?:(?:your|the) "
    r"(?:to-?do|task)[ -]?list|your (?:plan|progress|memory|scratchpad))\b[^\n]{0,60}\Z|"
    r"(?:dies(?:e nachricht)?|das) ist eine (?:automatische|automatisierte|system-?)\s?"
    r"(?:nachricht|meldung|erinnerung|benachrichtigung)\b|"
    r"(?:automatische (?:nachricht|meldung|erinnerung)|system(?:nachricht|meldung|hinweis))\s?:|"
    r"(?:ceci|il) est un (?:message|rappel|avis) (?:automatique|du système)\b|"
    r"(?:message|rappel|avis|notification) (?:automatique|du système)\s?:|"
    r"(?:est[eo] es un|est[ae] é uma?) (?:mensaje|recordatorio|aviso|mensagem|lembrete) "
    r"(?:autom[áa]tic[oa]|del sistema|do sistema)\b|"
    r"(?:mensaje|recordatorio|aviso|mensagem|lembrete) (?:autom[áa]tic[oa]|d[eo]l? sistema)\s?:|"
    r"这是一?[条个]?(?:自动|系统)(?:消息|提示|提醒|通知)|"
    r"[【\[]?(?:系统|自动)(?:消息|提示|提醒|通知)[】\]:：]|これは(?:自動|システム)(?:メッセージ|通知)|"
    r"[【\[]?(?:自動|システム)(?:メッセージ|通知)[】\]:：]|"
    r"это (?:автоматическое|системное) (?:сообщение|уведомление|напоминание)\b|"
    r"(?:автоматическое|системное) (?:сообщение|уведомление|напоминание)\s?:)",
    re.IGNORECASE,
)
_OWN = re.compile(
    r"[?？]|\b(?:i|i'm|you|your|my|me|we|please|pls|thanks?|why|how|what|that|this|it's|don't|not|"
    r"ich|du|dein|bitte|danke|warum|nicht|das|yo|tu|por|gracias|no|je|vous|merci|pourquoi)\b|"
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0400-\u04ff]",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"[?？]|\b(?:i|i'm|you|your|my|please|pls|thanks?|why|ich|dein|bitte|danke|gracias|merci)\b",
    re.IGNORECASE,
)
_TYPED = re.compile(
    r"\byou(?:'ve| have)? (?:forgot|missed|ignored|broke|should have)\b|"
    r"\b(?:wrong|incorrect)(?=[.,;!]|\s*\Z)|\b(?:is|was|not|it's) (?:too|wrong|right)\b|"
    r"\b(?:should|ought to) be\b|\bfix (?:it|this|that)\b|\bto me\b|\bthough\s*\Z",
    re.IGNORECASE,
)
"""How a person judges what they quote in the same line."""
_ERROR = re.compile(r"[^\n:]{0,80}\b(?:errors?|failures?|exceptions?|failed)\b", re.IGNORECASE)
_TO_BE_FIXED = re.compile(r"\bfix (?:it|this|that)\b|\blook again\b", re.IGNORECASE)
"""The same behind an error's name: a program also says that a value is wrong."""
_ASKS = re.compile(r", please\b|\bplease\W{0,3}\Z")
"""How people end a sentence that a harness ends with a full stop."""
_MARKED = re.compile(
    r"\[(?:tool|function|command|reminder|background|context)\] (?:I\b|[a-z])[^\d\n=<>{}/]{0,300}\Z"
)
"""A label before a sentence that begins in small letters and has no form of a log."""
_MEANT = re.compile(r"\b(?:names?|make|use|call|keep|needs?|must|better|instead)\b", re.IGNORECASE)
_SCORED = re.compile(
    r"[A-Z][a-z]{3,6}: ?\d{1,3}/\d{1,3}, (?:reason|comments?|feedback): [a-z][^\n]{0,300}\Z"
)
_BY_USER = re.compile(
    r"(?:the )?user (?:has )?(?:rejected|denied|declined|cancelled|canceled) (?:the|this|your) "
    r"(?:edit|change|tool|command|action|request|operation|permission)"
    r"(?: (?:to|of|for|call|use|execution)(?: [^\s]{1,300})?)?[.!]?\Z|"
    r"tool (?:execution|call|use) was (?:cancelled|canceled|rejected|denied|interrupted) "
    r"by the user[.!]?\Z",
    re.IGNORECASE,
)
"""What an agent reports of what the person did: nobody says it of oneself."""
_FENCE, _FENCE_END = "```json\n", "\n```"
_LONGEST_REPR, _MOST_BRACKETS = 4000, 100
_OWN_SCRIPT = re.compile(r"\W{0,4}[\u3040-\u30ff\u3400-\u9fff\u0400-\u04ff]")
_ADDRESS_ABROAD = re.compile(
    r"[?？]|[你您请請吗]|不对|错了|谢谢|ください|ありがとう|なぜ|違|пожалуйста|спасибо|почему",
    re.IGNORECASE,
)
"""A person's words beside a report whose heading is in their own script."""
_LOG_LINE = re.compile(
    r"\A(?:\s|\$ |>>> |[#|+*=~-]{2}|\[?\d{4}-\d\d-\d\d|\[?\d\d:\d\d|\[|/|\{|\}|at |"
    r"[\w.]+(?:Error|Exception|Warning)\b|(?:DEBUG|INFO|WARN|WARNING|ERROR|FATAL|TRACE)\b|"
    r"(?:PASS|FAIL|ok|not ok|npm|make|gcc|cargo|Compiling|File|E|tests?)\b[ :/]|\S+[:=]\d|\S{40})"
)
_FORMAT = re.compile(
    r"\b(?:respond|reply|answer|return|output|format)\b[^.\n]{0,60}\b(?:json|xml|yaml|only|exactly|"
    r"format|schema)\b|\bcontinue if you have next steps\b|"
    r"\byour (?:response|output|answer) must\b|"
    r"\byour task is to\b|\byou must (?:respond|reply|answer|return|output|call|use)\b",
    re.IGNORECASE,
)
_SECTION = re.compile(
    r"^(?:#{1,4} [^\n]{1,80}|[A-Z][\w ]{2,40}:|</?[a-zA-Z_]\w{2,40}>|"
    r"\{\{?[^\n]{0,80}\}\}?|```json)$",
    re.MULTILINE,
)
_HEAD_CHARS, _LOOKED_AT, _LONG_LOG, _LOG_SHARE = 4000, 200, 12, 0.85
_TEMPLATE_CHARS = 200


def source_of(text: str) -> Source | None:
    """Who wrote a text in the user role: a person, the environment, or None for a machine's note.

    >>> source_of("no, shorter please"), source_of('{"exit_code": 1}')
    (<Source.USER: 'user'>, <Source.ENVIRONMENT: 'environment'>)
    """
    about, report = _ABOUT_FORM.match(text), _REPORT.match(text)  # the slowest: once each
    if _is_typed(text, about, report) and not _RESULT_TAG.match(text):
        return Source.USER
    forms = (_RESULT_LINE, _RESULT_TAG, _ASSESSED, _BY_USER)
    if about or any(form.match(text) for form in forms):
        return Source.ENVIRONMENT
    if is_json(text) or is_tagged(text):
        return Source.ENVIRONMENT
    if banner := _BANNER.match(text):
        return Source.ENVIRONMENT if _RESULT_BANNER.match(banner.group()) else None
    if _AUTOMATED.match(text):
        return None
    if (report or is_log(text)) and not _has_own_words(text):
        return Source.ENVIRONMENT
    return None if is_template(text) else Source.USER


def is_typed(text: str) -> bool:
    """Whether a text of one line, such as a machine may write, says what only a person says.

    >>> is_typed("Result: wrong. The total is 12."), is_typed("Result: 12")
    (True, False)
    """
    return _is_typed(text, _ABOUT_FORM.match(text), _REPORT.match(text))


def _is_typed(text: str, about: re.Match[str] | None, report: re.Match[str] | None) -> bool:
    if "\n" in text or len(text) > _HEAD_CHARS:
        return False
    if _MARKED.match(text) and (_OWN.search(text) or _MEANT.search(text)):
        return True
    if _SCORED.match(text):
        return True
    if about:
        return _ASKS.search(text) is not None
    if not report:
        return False
    return (_TO_BE_FIXED if _ERROR.match(text) else _TYPED).search(text) is not None


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON object or array, also in a fence or as Python shows it."""
    if text.startswith(_FENCE) and text.endswith(_FENCE_END):
        text = text[len(_FENCE) : -len(_FENCE_END)].strip()
    if text.startswith("{'"):
        return _is_repr(text)
    if text[:1] + text[-1:] not in ("{}", "[]") or len(text) < 3:
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_repr(text: str) -> bool:
    if len(text) > _LONGEST_REPR or text.count("{") + text.count("[") > _MOST_BRACKETS:
        return False
    try:
        return isinstance(ast.literal_eval(text), dict)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


def is_tagged(text: str) -> bool:
    """Whether the whole text stands between tags; formatting tags do not count.

    >>> is_tagged("<x>1</x>\\n<y z='2'>3</y>"), is_tagged("<x>1</x> good"), is_tagged("<b>good</b>")
    (True, False, False)
    """
    position, any_tag = 0, False
    while position < len(text):
        opened = _TAG.match(text, position)
        if opened is None or _FORMATTING.match(opened.group()):
            return False
        position = opened.end()
        if not opened.group().endswith("/>"):
            closing = f"</{opened[1]}>"
            found = text.find(closing, position)
            if found < 0:
                return False
            position = found + len(closing)
        any_tag = True
        while text[position : position + 1].isspace():
            position += 1
    return any_tag


def is_log(text: str) -> bool:
    """Whether nearly all lines of a long text look like a program's output."""
    if text.count("\n", 0, _HEAD_CHARS * 4) + 1 < _LONG_LOG:
        return False
    lines = [line for line in text[: 50 * _HEAD_CHARS].splitlines()[:_LOOKED_AT] if line.strip()]
    alike = sum(1 for line in lines if _LOG_LINE.match(line))
    return len(lines) >= _LONG_LOG and alike >= _LOG_SHARE * len(lines)


def is_template(text: str) -> bool:
    """Whether a longer text has headings and prescribes the form of the answer."""
    head = text[:_HEAD_CHARS]
    if len(head) < _TEMPLATE_CHARS or "\n" not in head:
        return False
    if sum(1 for _ in _SECTION.finditer(head)) < 2:
        return False
    return bool(_FORMAT.search(head) or _FORMAT.search(text[-2000:]))


def _has_own_words(text: str) -> bool:
    """Whether a person's words stand in a report: in its one line, or at its beginning or end."""
    if not text[:4].isascii() and _OWN_SCRIPT.match(text):
        return _ADDRESS_ABROAD.search(text[:_HEAD_CHARS] + text[-_HEAD_CHARS:]) is not None
    if "\n" not in text:
        return _ADDRESS.search(text[:_HEAD_CHARS]) is not None
    first = text[:_HEAD_CHARS].partition("\n\n")[0]
    last = text[-_HEAD_CHARS:].rpartition("\n\n")[2]
    return any(_is_prose(block.strip()) for block in (first, last) if block.strip() != text)


def _is_prose(block: str) -> bool:
    lines = block.splitlines()
    return (
        len(lines) < _LONG_LOG // 2
        and not _REPORT.match(block)
        and not any(_LOG_LINE.match(line) for line in lines)
        and _OWN.search(block) is not None
    )
