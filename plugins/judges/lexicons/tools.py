"""What tools and the environment print when a call failed, succeeded in part, or succeeded.

The patterns see the folded output in lower case. They have all languages at once, because a tool
writes in its machine's language, not in its user's.
"""

from __future__ import annotations

from plugins.judges.lexicons.shape import table

FAILED = table(
    (
        r"\b(?:enoent|eacces|eperm|eexist|unrecognized|unresolved|illegal|mismatch|"
        r"duplicate (?:key|entry|column)|violates|merge conflict|conflict \(|division by zero|"
        r"out of bounds|not a valid|not recognized|not recognised|no matches found|"
        r"nothing matched|deadlock|overlaps? with|exceeds)\b|^usage: |\bdid you mean\b|"
        r"\bexpected (?:\w+ ){1,4}(?:but |, )?(?:got|found|received|was)\b|\b(?:unauthorized|"
        r"unauthenticated|expired token|token expired|login required)\b",
        r"\b(?:syntaxfehler|konflikt|stimmt nicht uberein|erwartet wurde|kein\w* gultig\w*|"
        r"bereits (?:vorhanden|belegt|vergeben)|existiert bereits|uberschreitet|gesperrt|"
        r"fehlende[rs]?)\b|\b(?:conflicto|duplicad[oa]|no coincide\w*|error de sintaxis|"
        r"ya existe|no autorizad[oa]|sin permisos?|caducad[oa]|excede|supera el)\b|(?:冲突|重复|"
        r"越界|不匹配|已存在|未授权|未登录|登录(?:已)?(?:过期|失效)|超出|不能为空|应为|应该是|"
        r"已被占用|已满|不足)(?!\D{0,3}[:]?\s*(?:0\b|\[\]|无))",
        r"\"(?:status|state|result|estado|ergebnis)\"\s*:\s*\"(?:rejected|declined|denied|"
        r"refused|invalid|not_?found|cancell?ed|rechazad\w+|abgelehnt)",
        r"^\W*(?:\w+[.:])*\w*(?:error|exception)\b\s*(?:\d+\s*)?(?::|$)",
        r"^\W*(?:error|fatal|failed|failure|panic|abort(?:ed)?|fehler|fehlgeschlagen|fallo|"
        r"denied|refused|rejected|invalid)\b(?!.*\b(?:is ok|successful)\b)",
        r"^\W*(?:错误|失败|报错|致命|异常)",
        r"^[\w./-]{1,40}: (?:line \d+: |linea \d+: |zeile \d+: )?(?:fatal|error|fehler|错误|"
        r"cannot|can't|unable|exiting|unexpected|zugriff|kann nicht|no se (?:puede|pudo)|无法|"
        r"没有|.*: (?:no |keine |nicht |permiso |not ))",
        r"traceback \(most recent call last\)|\bat [\w.$]+\([\w.]+:\d+\)",
        r"(?:exit|return|status)[ _]?(?:code|status)?\W{0,4}(?:[1-9]\d*|-\d+)\b(?! *(?:ok|"
        r"created|accepted))",
        r"exited with (?:code |status )?[1-9]|\b(?:codigo|code|代码) (?:de salida |de error |"
        r"exit )?[1-9]\d*$",
        r"command not found|no such \w+|permission denied|is not recognized as|"
        r"(?<!0 )\bnot found\b(?!: 0)|does not exist|doesn't exist|cannot (?:find|read|open|stat|"
        r"access|import|resolve|be)|could not (?:find|open|read|parse|be)|already exists|"
        r"not supported|unsupported|not allowed|forbidden|unauthori[sz]ed|not permitted|"
        r"bad request|access denied|out of range|must be |is required|conflict(?:s|ed)? (?:in|"
        r"with)\b",
        r"segmentation fault|core dumped|syntax ?error|undefined (?:reference|variable|method|"
        r"is not)|is not defined|invalid (?:argument|syntax|json|parameters?|option|value|input|"
        r"date|format|token|recipient|literal|key|type|url)|unknown (?:tool|function|option|"
        r"command|argument|column|field|entity|device)",
        r"\"(?:is_?error|error|fehler|errormessage|err)\"\s*:\s*(?:true|\"[^\"]|\{)|\"(?:ok|"
        r"success|exito|erfolg|succeeded|成功)\"\s*:\s*false|\"status\"\s*:\s*\"?(?:error|failed|"
        r"failure|4\d\d|fehler)|\"(?:code|errcode|ret)\"\s*:\s*\"?-?[1-9]\d*",
        r"\b[1-9]\d* (?:failed|errors?|failures?|failing|fehler(?:haft)?|fallos?|"
        r"errores)\b(?!: 0)|[1-9]\d*\s*(?:个|项|处)?(?:错误|失败)",
        r"\"(?:failed|rejected|errors?|fehler|errores|fallidos|conflicts)\"\s*:\s*(?:[1-9]\d*|"
        r"\[\s*[^\]\s])",
        r"validation error|missing required|unexpected (?:keyword|token|argument|eof|end)|"
        r"type ?mismatch",
        r"\bnicht (?:gefunden|moglich|vorhanden|erlaubt|unterstutzt|definiert|lesbar|zulassig|"
        r"erreicht)\b|\b(?:ungultig\w*|unbekannt\w*|verweigert|abgelehnt|abgebrochen|verworfen|"
        r"gescheitert|fehlgeschlagen|existiert nicht|keine berechtigung|schlug fehl|konnte nicht|"
        r"kein\w* solche\w*)\b",
        r"\bno (?:existe|se (?:encontro|encuentra|pudo|puede|reconoce|ha podido)|encontrad[oa]|"
        r"permitid[oa]|valid[oa]|es (?:un|una)? ?valid[oa]|tiene permiso|hay ningun)\b|"
        r"\b(?:permiso|acceso) denegado\b|\b(?:desconocid[oa]|invalid[oa]s?|rechazad[oa]|"
        r"denegad[oa]|se esperaba|fallid[oa]|incorrect[oa])\b",
        r"(?:不存在|找不到|未找到|没有找到|不支持|无法|无效|拒绝|未定义|未知|没有权限|权限不足|"
        r"参数错误|格式错误|缺少|失败|不合法|非法|已取消|冲突[:](?!\s*\[\]))(?!\D{0,3}[:]?\s*0\b)",
        r"^\W*(?:×|✗|✘|❌|✖)|\b(?:50[01]|4(?:0[0-79]|1\d|2[0-8]))\b (?:[45]\.\d|bad|not|unauth|"
        r"forb|internal|conflict|un|pay|gone|method)",
        r"\berr!|^e: |^e   |\bfail\b(?!ed|ure|over|: 0)",
    )
)
"""The call failed by its own fault, unless OUTAGE matches too."""

OUTAGE = table(
    (
        r"\b(?:econnrefused|econnreset|etimedout|eai_again|enospc|captcha|no signal|low battery|"
        r"battery empty|unplugged|akku leer|sin cobertura|sin bateria|overloaded|uberlastet|"
        r"saturad[oa])\b|没电|信号|拥堵|排队|升级中|关机|欠费",
        r"\btimed out\b|\btime[- ]?out\b(?:$| (?:error|exceeded|expired|after|waiting|was)|\W+\(|"
        r": )|\bzeituberschreitung\b|\btiempo de espera\b|超时",
        r"connection (?:refused|reset|closed|error|aborted|lost)|verbindung (?:abgelehnt|"
        r"unterbrochen|verweigert|getrennt)|conexion (?:rechazada|perdida|reiniciada|"
        r"interrumpida)|连接(?:被拒绝|被重置|断开|中断)",
        r"temporarily unavailable|try (?:again )?later|retry (?:later|after)|spater (?:erneut|"
        r"noch)|(?:intente|intentelo|intentalo) (?:mas tarde|de nuevo)|稍后(?:再|重)试|请稍后",
        r"(?:http|error|status|code|fehler|错误)\W{0,4}(?:\w+\W)?(?:429|50[234])\b|^\W*(?:429|"
        r"50[234])\b|\b(?:429|50[234]) (?:too|bad|service|gateway)|rate limit|too many requests|"
        r"service unavailable|network is|bad gateway|\bquota\b|\bcuota\b|\bkontingent\b|限流|"
        r"配额|频率(?:限制|过高)|请求过多",
        r"name resolution|could not resolve|no route to host|no space left|out of memory|"
        r"disk (?:is )?full|oom-?kill|power (?:loss|failure)|read-only file system|"
        r"no hay espacio|sin espacio|kein (?:speicher)?platz|speicher voll|stromausfall|"
        r"磁盘(?:已满|空间不足)|内存不足|断电|断网|网络(?:不可达|异常|中断|错误|不通)",
        r"(?:under|in|scheduled) maintenance|maintenance (?:job|mode|window)|wartung\w*|"
        r"mantenimiento|维护|检修|停机|server (?:is )?(?:down|busy|overloaded|offline)|"
        r"service (?:is )?(?:down|degraded)|servicio (?:no disponible|caido)|"
        r"dienst nicht verfugbar|服务(?:不可用|繁忙|器繁忙)|系统繁忙|unreachable|no disponible|"
        r"nicht (?:verfugbar|erreichbar)|inalcanzable|disconnected by|不可用|暂时",
    )
)
"""A failure that is not the reply's fault."""

ITEM_DONE = table(
    (
        r"(?:^|[,;]\s*)\W*(?:[\w./@-]+ ){0,2}[\w./@-]+\s*(?:[:=|→–-]+\s*)?(?:ok|done|sent|synced|"
        r"delivered|gesendet|enviad[oa]|entregad[oa]|成功|✓|✔|✅)\W*(?:$|[,;])",
        r"\b[1-9]\d* (?:\w+ ){0,2}(?:imported|sent|uploaded|copied|converted|updated|migrated|"
        r"synced|processed|delivered|succeeded|successful|created|moved|renamed|downloaded|"
        r"deleted|importiert|gesendet|ubertragen|kopiert|importad[oa]s|enviad[oa]s|copiad[oa]s|"
        r"convertid[oa]s|procesad[oa]s|entregad[oa]s|correct[oa]s|done|ok|completed?|finished|"
        r"passed on|saved|written|installed|added|removed|fixed|applied|restarted|matched|valid|"
        r"erledigt|gespeichert|umgewandelt|aktualisiert|verschoben|installiert|guardad[oa]s|"
        r"actualizad[oa]s|movid[oa]s|instalad[oa]s)\b|(?:成功|已(?:发送|导入|上传|转换|处理|"
        r"完成))\D{0,4}[1-9]\d*|[1-9]\d*\s*(?:条|个|封|张|台|份|篇|家|人|次)?(?:已)?(?:发送|导入|"
        r"上传|转换|处理|下载|更新)?成功",
        r"\"(?:sent|created|updated|imported|accepted|delivered|succeeded|success_count|enviados|"
        r"ok|done)\"\s*:\s*(?:[1-9]\d*|\[\s*[^\]\s])",
    )
)
"""One or more of several items succeeded."""

TESTS = table((r"\b\d+ (?:passed|passing)\b|\btests?\b|\bspecs?\b|用例|测试",))
"""A test run: one failure fails it as a whole."""

SHORT = table(
    (
        r"\b[1-9]\d* (?:\w+ ){0,3}(?:failed|skipped|missing|rejected|pending|left|remaining|"
        r"errors?|conflicts?|unreachable|offline|not \w+|ignored|unchanged|unmatched|timed|"
        r"fehlgeschlagen|ubersprungen|fehlen|offen|ausstehend|abgelehnt|nicht \w+|fallid[oa]s|"
        r"fallaron|omitid[oa]s|pendientes|rechazad[oa]s|sin \w+|no \w+)\b|\b(?:failed|skipped|"
        r"missing|rejected|pending|errors?|remaining|fehlgeschlagen|ubersprungen|offen|fallidos|"
        r"omitidos|pendientes)\"?\s*[:=]\s*(?:[1-9]|\[\s*[^\]\s])|(?:失败|跳过|剩余?|未|"
        r"缺)\D{0,6}[1-9]\d*",
    )
)
"""A number of items that were not done."""

PARTIAL = table(
    (
        r"\b(?:skipped|ubersprungen|omitid[oa]s?|devuelt[oa]s?|pendientes?|ausstehend|"
        r"ausgeschaltet|apagad[oa]s?|offline|unreachable|partially|teilweise|parcialmente|"
        r"incomplete|unvollstandig|incomplet[oa]|remaining|left over|ubrig|offen|restantes?|"
        r"not yet|noch nicht|aun no|todavia no)\b",
        r"跳过|部分|剩余|未完成|离线|待处理|待完成|其余|尚未|还有\d",
    )
)
"""A part was done and a part was not."""

SUCCEEDED = table(
    (
        r"\"(?:ok|success|exito|erfolg|succeeded)\"\s*:\s*true|\"(?:code|errcode)\"\s*:\s*\"?0\b|"
        r"\"status\"\s*:\s*\"?(?:ok|success|created|sent|done|2\d\d|confirmed|accepted|queued|"
        r"active)",
        r"(?:exit|return|status|codigo|code)[ _]?(?:code|status|de salida)?\W{0,4}0\b|"
        r"^\W*20[0-6]\W*$|\b20[0-6] (?:ok|created|accepted|no content)\b",
        r"\b[1-9]\d* (?:passed|passing|bestanden|pasaron|pasados)\b|^ok\b|\btest result: ok\b|"
        r"^pass$",
        r"\b(?:success(?:ful|fully)?|succeeded|done|completed?|created|saved|sent|updated|"
        r"deleted|removed|installed|deployed|uploaded|written|copied|moved|renamed|restarted|"
        r"started|enabled|disabled|scheduled|added|built|published|pushed|merged|committed|"
        r"finished|live|active|running|healthy|up to date|verified|valid|no (?:issues|problems|"
        r"errors) found|all checks passed)\b",
        r"\b(?:erfolgreich\w*|fertig|erledigt|gespeichert|gesendet|erstellt|angelegt|"
        r"aktualisiert|geloscht|entfernt|installiert|gestartet|aktiviert|deaktiviert|hinzugefugt|"
        r"verschickt|ubertragen|abgeschlossen|eingetragen|umbenannt|verschoben|kopiert|gebucht|"
        r"gestellt|bestatigt|keine (?:fehler|probleme))\b",
        r"\b(?:exito|correctamente|completad[oa]s?|guardad[oa]s?|enviad[oa]s?|cread[oa]s?|"
        r"actualizad[oa]s?|eliminad[oa]s?|borrad[oa]s?|instalad[oa]s?|iniciad[oa]|activad[oa]s?|"
        r"desactivad[oa]s?|anadid[oa]s?|terminad[oa]|hecho|listo|confirmad[oa]s?|programad[oa]s?|"
        r"reservad[oa]s?|copiad[oa]s?|movid[oa]s?|renombrad[oa]s?|sin errores|subid[oa]s?)\b",
        r"成功|完成|已(?:保存|发送|创建|更新|删除|安装|启动|重启|添加|设置|关闭|打开|提交|上传|"
        r"预订|预约|修改|同步|移动|复制|推送|合并|生效|就绪|经是最新)|✓|✔|✅|通过",
        r"^\W*[✓✔✅√]|\b\d+ files? changed\b|\bfast-forward\b|\b(?:0 filas|0 rows|0 zeilen|"
        r"no rows)\b",
    )
)
"""The output says that the call succeeded."""
